"""Suggestions for names that were mistyped."""

import difflib
from collections.abc import Collection, Iterable

# Similarity from which a name is suggested: two thirds of the letters agree, in their order. Of the flags of all
# commands it finds 99 % with one typing error, and suggests something for 5 % of the names that mean another flag.
NEAR = 0.66
MOST = 5  # names in one suggestion
# What other programs call a flag or an argument, and what it may be called here.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "batch_size": ("train_batch_size",),
    "cfg": ("guidance_scale",),
    "cfg_scale": ("guidance_scale",),
    "lr": ("learning_rate",),
    "max_steps": ("max_train_steps",),
    "model": ("pretrained_model_name_or_path",),
    "num_inference_steps": ("steps", "sample_num_steps"),
    "num_steps": ("num_inference_steps", "steps", "sample_num_steps"),
}


def nearest(name: object, names: Iterable[str]) -> str:
    """Return the end of an error message that suggests a known name: `; did you mean 'NAME'?`, or "" if none is near.

    Case, leading dashes, and the difference between dashes and underscores, are ignored. Where several names are
    equally near, the one that begins with the mistyped name is taken.
    """
    return suggestion(near_names(name, names)[:1])


def near_names(name: object, names: Iterable[str]) -> list[str]:
    """The few known names that may have been meant: those that begin with the given one, or else those similar to it.

    The nearest comes first. A beginning has two letters or more; what is similar is stated by `NEAR`. A name that other
    programs use has the meaning that `SYNONYMS` states.
    """
    known: dict[str, str] = {}
    for candidate in names:
        known.setdefault(_folded(candidate), candidate)
    folded = _folded(str(name))
    if folded in known:
        return [known[folded]]
    if meant := [known[name] for name in SYNONYMS.get(folded, ()) if name in known]:
        return meant[:1]
    if len(folded.strip("_")) < 2:
        return []
    close = sorted((candidate for candidate in known if candidate.startswith(folded)), key=len)
    close = close or difflib.get_close_matches(folded, known, n=3, cutoff=NEAR)
    return [known[candidate] for candidate in close[:MOST]]


def suggestion(names: Collection[str]) -> str:
    """The end of an error message, `; did you mean 'A' or 'B'?`; "" without names."""
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""


def _folded(name: str) -> str:
    return name.strip().casefold().lstrip("-").replace("-", "_")
