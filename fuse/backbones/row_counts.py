"""The numbers of rows that forwards have: those there are, or few different ones, to which the batch is padded."""

import torch
from torch import Tensor


def row_counts(rows: int, *, most: int | None = None, multiple: int = 1) -> list[int]:
    """The numbers of rows of the forwards that together take so many rows, and perhaps some in vain at the end.

    Args:
        most: rows of one forward.
        multiple: of what each number is the next multiple, as long as that is not more than `most`.
    """
    most = most or -(-rows // multiple) * multiple
    full, rest = divmod(rows, most)
    last = min(-(-rest // multiple) * multiple, most)
    return [most] * full + [last] * bool(rest)


def padded(values: Tensor, count: int) -> Tensor:
    """Values of so many rows, the last of which is repeated."""
    if count == len(values):
        return values
    return torch.cat([values, values[-1:].expand(count - len(values), *values.shape[1:])])
