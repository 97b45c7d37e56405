"""How much of the text that a prompt asks for was read in an image: what `ocr` makes of recognised text."""

import re
import unicodedata
from collections.abc import Sequence

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def quoted_texts(prompt: str) -> list[str]:
    """Return the texts between double quotes, straight or curly, in the order of the prompt.

    Raises:
        ValueError: If there is none but white space. The message names the prompt.
    """
    texts = [straight or curly for straight, curly in QUOTED.findall(prompt)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(
            f"the prompt {prompt!r} has no text between double quotes; expected the text that the image shall show, "
            'such as a sign that says "OPEN"'
        )
    return texts


def legibility(read: str, texts: Sequence[str]) -> float:
    """Return the mean over the wanted texts t of r(t) = 1 - min(d(read, t), |t|) / |t|, and r(t) = 1 if t was read.

    d is Levenshtein's distance. For one text this is Flow-GRPO's reward (arXiv:2505.05470, flow_grpo/ocr.py), which
    ignores case and spaces; here other white space and Unicode's compatible forms (NFKC) are ignored too. Flow-GRPO
    takes only the first of several texts; here those that were read are taken out of `read`, the longest first, and the
    others are compared with what is left.

    Args:
        read: The text that was recognised.
        texts: Texts that are not only white space.
    """
    left = _normalise(read)
    missing = []
    for text in sorted(map(_normalise, texts), key=len, reverse=True):
        if text in left:
            left = left.replace(text, "\n", 1)  # which no normalised text has: what it separated stays separate
        else:
            missing.append(text)
    left = left.replace("\n", "")
    partly = (1 - min(edit_distance(left, text), len(text)) / len(text) for text in missing)
    return (len(texts) - len(missing) + sum(partly)) / len(texts)


def edit_distance(a: str, b: str) -> int:
    """Return the fewest insertions, deletions and substitutions of a character that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def _normalise(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).lower().split())
