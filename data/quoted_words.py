"""Prompts that ask for text in the image, in double quotes, for rewards that read it.

They are split by their texts: no text is in both splits, and every carrier of a text, such as a sign, is.
"""

import random

CARRIERS = (
    "A wooden sign that says",
    "A neon sign above a door that reads",
    "A storefront with the name",
    "A chalkboard on which is written",
    "A road sign that reads",
    "A coffee mug with the words",
    "A birthday cake with the icing",
    "The cover of an old book titled",
    "A concert poster that announces",
    "A knitted sweater with the slogan",
    "A robot that holds a card with",
    "Graffiti on a brick wall that spells",
)

# Of one to three words, in the letters, digits and marks of ASCII. Every fifth is held out.
TEXTS = (
    *("OPEN", "Bakery", "Good Morning", "Exit", "Route 66"),
    *("HELLO", "Welcome Home", "Museum", "50% OFF", "Dream Big"),
    *("Library", "Wet Paint", "Happy Birthday", "STOP", "Cafe Luna"),
    *("No Parking", "Fresh Bread", "Gate 12", "Adventure", "Mind the Gap"),
    *("Thank You", "Jazz Night", "CLOSED", "Coffee", "Summer Sale"),
    *("Slow Down", "Pizza", "Level 42", "Be Kind", "Lost and Found"),
    *("Garden", "SALE", "Keep Left", "Night Train", "Free Hugs"),
    *("Ocean View", "Bookshop", "Push", "Est. 1987", "Never Give Up"),
)


def quoted_word_prompts(*, held_out: bool) -> list[str]:
    """Return the 384 prompts of the training split or the 96 of the held-out split: every text on every carrier.

    They are in a random order that is always the same, so that any number of evenly spaced ones is varied.
    """
    texts = [text for number, text in enumerate(TEXTS) if (number % 5 == 4) == held_out]
    prompts = [f'{carrier} "{text}".' for carrier in CARRIERS for text in texts]
    random.Random(0).shuffle(prompts)
    return prompts
