"""Valid seeds, and generators with consecutive seeds. Importing this module does not import torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIMIT = 2**64


def check_seed(seed: int) -> int:
    """Return the seed if `torch.Generator.manual_seed` accepts it.

    Raises:
        ValueError: If it is negative or larger than 2^64 - 1.
    """
    if not 0 <= seed < LIMIT:
        raise ValueError(f"seed {seed}; expected an integer from 0 to 2^64 - 1, {LIMIT - 1}")
    return seed


def numbered_generator(seed: int, index: int) -> "torch.Generator":
    """Return a generator seeded with seed + index, modulo 2^64."""
    import torch

    return torch.Generator().manual_seed((check_seed(seed) + index) % LIMIT)
