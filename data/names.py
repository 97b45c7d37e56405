"""Suggestions for names that were mistyped."""

import difflib
from collections.abc import Iterable


def nearest(name: object, names: Iterable[str]) -> str:
    """Return the end of an error message that suggests a known name: `; did you mean 'NAME'?`, or "" if none is close.

    Case, and the difference between dashes and underscores, are ignored. Where several names are equally close, the one
    that begins with the mistyped name is taken.
    """
    known: dict[str, str] = {}
    for candidate in names:
        known.setdefault(_folded(candidate), candidate)
    folded = _folded(str(name))
    close = [folded] if folded in known else []
    if len(folded.strip("_")) > 1:
        close += [candidate for candidate in known if candidate.startswith(folded)][:1]
        close += difflib.get_close_matches(folded, known, n=1, cutoff=0.5)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def _folded(name: str) -> str:
    return name.strip().casefold().replace("-", "_")
