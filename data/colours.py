"""Prompts of coloured objects for models such as Stable Diffusion, similar to those of DPOK and Diffusion Blend.

Prompts such as "A green dog." and "A green dog and a red car." are split by their (colour, object) pairs: no pair is in
both splits, and every colour and every object is, so held-out prompts combine known colours and objects in new ways.
"""

from stepfuse.data.emoji import with_article

# DPOK (arXiv:2305.16381, section 5) trains on one prompt each for colour, composition, counting and location.
DPOK_PROMPTS = (
    "A green colored rabbit.",
    "A cat and a dog.",
    "Four wolves in the park.",
    "A dog on the moon.",
)

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# Classes of COCO with one-word names, of objects that exist in several colours.
OBJECTS = (
    *("bird", "cat", "dog", "horse", "cow"),
    *("bicycle", "car", "bus", "boat", "train"),
    *("bench", "chair", "couch", "bowl", "cup"),
    *("vase", "clock", "backpack", "umbrella", "suitcase"),
)

# Index of the second object minus that of the first; 0 means there is no second object. No other shift is a multiple of
# 10, because both objects would have one colour, and no two sum to 20, because a prompt would occur with both orders.
SHIFTS = (0, 1, 2, 4, 7)


def colour_prompts(*, held_out: bool) -> list[str]:
    """Return the 800 prompts of the training split or the 200 prompts of the held-out split.

    The pair of object i and colour j is on the diagonal (i + j) mod 10 of a Latin square. Diagonals 0 and 5 are held
    out, which are 2 of 10 colours of every object and 4 of 20 objects of every colour. Both objects of a prompt are on
    the same diagonal, so they belong to the same split. The first fifth of the prompts has one object.
    """
    diagonals = [diagonal for diagonal in range(len(COLOURS)) if (diagonal % 5 == 0) == held_out]
    return [_prompt(i, diagonal, shift) for shift in SHIFTS for i in range(len(OBJECTS)) for diagonal in diagonals]


def _prompt(i: int, diagonal: int, shift: int) -> str:
    indices = [i, (i + shift) % len(OBJECTS)] if shift else [i]
    phrases = [with_article(f"{COLOURS[(diagonal - k) % len(COLOURS)]} {OBJECTS[k]}") for k in indices]
    return f"{' and '.join(phrases).capitalize()}."
