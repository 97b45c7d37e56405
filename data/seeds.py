"""Seeds: which are valid, and those of images that follow one. Importing this module does not import torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIMIT = 2**64


def check_seed(seed: int) -> int:
    """The seed, if torch takes it.

    Raises:
        ValueError: for one that is negative or beyond 2^64 - 1.
    """
    if not 0 <= seed < LIMIT:
        raise ValueError(f"seed {seed}; expected an integer from 0 to 2^64 - 1, {LIMIT - 1}")
    return seed


def numbered_generator(seed: int, number: int) -> "torch.Generator":
    """A generator seeded with seed + number, modulo 2^64."""
    import torch

    return torch.Generator().manual_seed((check_seed(seed) + number) % LIMIT)
