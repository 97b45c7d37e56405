"""Help of the fields of a settings dataclass, from docstrings. Importing this module does not import torch."""

import inspect
import re


def help_texts(settings: type) -> dict[str, tuple[str, str]]:
    """Heading and help of each field: the first line of its class's docstring, up to `:` or `.`, and its attribute."""
    texts = {}
    for owner in settings.__mro__:
        doc = inspect.cleandoc(owner.__doc__ or "")
        attributes = re.split(r"\n(?=    \w)", doc.partition("Attributes:")[2])
        for name, _, text in (part.strip().partition(": ") for part in attributes):
            texts[name] = (re.split("[:.]", doc, maxsplit=1)[0], " ".join(text.split()))
    return texts
