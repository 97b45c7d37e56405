"""Generators with consecutive seeds. Importing this module does not import torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIMIT = 2**64


def numbered_generator(seed: int, index: int) -> "torch.Generator":
    """Return a generator seeded with seed + index, modulo 2^64, or raise ValueError for a seed that torch refuses."""
    import torch

    if not 0 <= seed < LIMIT:
        raise ValueError(f"seed {seed}; expected an integer from 0 to 2^64 - 1, {LIMIT - 1}")
    return torch.Generator().manual_seed((seed + index) % LIMIT)
