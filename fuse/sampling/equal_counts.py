"""Numbers of rows whose forwards give a row the same bits.

Kernels are chosen by shapes, and another kernel may add in another order: a row of a batch of 3 may differ in its last
bits from the same row in a batch of 8. Which numbers of rows agree depends on the machine, so they are tried.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepfuse.data.stages import counted

OVERHEAD = 3  # of a forward, in rows: what a small network costs on a CPU beside its rows


def candidates(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 … and `most`: few numbers, each at most 1.5 times the one before."""
    powers = [2**k for k in range(most.bit_length())]
    return sorted({count for power in powers for count in (power, 3 * power // 2) if 0 < count <= most} | {most})


def find_equal_counts(forward: Callable[[Sequence[int]], Tensor], counts: Sequence[int]) -> list[int]:
    """Those of the counts whose forwards give each row the same bits, at any position of the batch.

    Several groups of counts may agree among themselves; the one with the least `mean_cost` is taken. One row alone is
    always among the groups.

    Args:
        forward: of rows, by their indices from 0 to the largest count.
        counts: in ascending order, the first of which is 1.
    """
    groups: list[list[int]] = []
    results: dict[int, Tensor] = {}
    for count in counted(counts, "batch sizes tried"):
        rows = range(count)
        result, half = forward(rows), count // 2
        reversed_rows, rotated = rows[::-1], [*rows[half:], *rows[:half]]
        if not torch.equal(result, forward(reversed_rows).flip(0)):
            continue  # bits depend on the position in the batch
        if not torch.equal(result, forward(rotated).roll(half, 0)):
            continue
        results[count] = result
        group = next((group for group in groups if torch.equal(result[: group[-1]], results[group[-1]])), None)
        if group is None:
            groups.append([count])
        else:
            group.append(count)
    return min(groups, key=lambda group: mean_cost(group, counts[-1]))


def mean_cost(counts: Sequence[int], most: int) -> float:
    """The mean over k = 1 to `most` of the cost of k rows by forwards of these counts, in units of one forward of k.

    A forward of c rows costs c + `OVERHEAD`; the last one of several may have more rows than are left.
    """
    costs = [0.0]
    for rows in range(1, most + 1):
        costs.append(min(count + OVERHEAD + costs[max(0, rows - count)] for count in counts))
    return sum(cost / (rows + OVERHEAD) for rows, cost in enumerate(costs[1:], 1)) / most
