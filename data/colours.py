"""Colour × object prompts for models of Stable Diffusion's size, in the spirit of DPOK and Diffusion Blend.

"A green dog." and "A green dog and a red car.", split by their (colour, object) pairs: no pair of
one split occurs in the other, alone or beside a second object, while every colour and every object
occurs in both. What is held out asks for new combinations of parts that were all trained on.
"""

# DPOK (arXiv:2305.16381, section 5) trains on one prompt each for colour, composition, count and location.
DPOK_PROMPTS = (
    "A green colored rabbit.",
    "A cat and a dog.",
    "Four wolves in the park.",
    "A dog on the moon.",
)

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# Of COCO's 80 classes, those of one word whose colour people choose or that come in several.
OBJECTS = (
    *("bird", "cat", "dog", "horse", "cow"),
    *("bicycle", "car", "bus", "boat", "train"),
    *("bench", "chair", "couch", "bowl", "cup"),
    *("vase", "clock", "backpack", "umbrella", "suitcase"),
)

# How far behind the first object the second one stands in OBJECTS; 0 is no second one. None is a multiple of 10, or
# the two would share a colour; no two sum to 20, or a prompt would return with its objects swapped.
SHIFTS = (0, 1, 2, 4, 7)


def colour_prompts(*, held_out: bool) -> list[str]:
    """The 800 prompts of the training split, or the 200 of the held-out one.

    Object i has colour j on the diagonal (i + j) mod 10 of a Latin square, whose diagonals 0 and 5 are held out:
    2 of 10 colours for every object, 4 of 20 objects for every colour. The second object of a prompt is taken from
    the diagonal of the first, so both are of one split. A fifth of the prompts, the first ones, have one object.
    """
    pairs = [
        (i, diagonal)
        for i in range(len(OBJECTS))
        for diagonal in range(len(COLOURS))
        if (diagonal % 5 == 0) == held_out
    ]
    return [_prompt(i, diagonal, shift) for shift in SHIFTS for i, diagonal in pairs]


def _prompt(i: int, diagonal: int, shift: int) -> str:
    phrase = _phrase(i, diagonal)
    if shift:
        phrase += f" and {_phrase((i + shift) % len(OBJECTS), diagonal)}"
    return f"{phrase.capitalize()}."


def _phrase(i: int, diagonal: int) -> str:
    colour = COLOURS[(diagonal - i) % len(COLOURS)]
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {OBJECTS[i]}"
