"""The parts of the check: what each measures, and for how long at most. Nothing here imports torch.

A part is `stepfuse.scripts.gpu.work:FUNCTION` called with the values here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPILED: dict[str, dict[str, str]] = {
    "eager": {},
    "graphs": dict(compile="regional", mode="reduce-overhead"),
    "compiled": dict(compile="regional"),
}
# Eight images are smaller, or the network has fewer layers, where all rows of eight adapters would take minutes.
SAMPLED: dict[str, dict[int, dict[str, int]]] = {
    "sd15": {1: dict(height=512, width=512), 8: dict(height=512, width=512)},
    "sdxl": {1: dict(height=1024, width=1024), 8: dict(height=512, width=512)},
    "sd35": {1: dict(height=512, width=512), 8: dict(height=512, width=512, layers=8)},
    "flux": {1: dict(height=512, width=512), 8: dict(height=512, width=512, layers=6)},
}
LETTERS = {
    "a": "tests that need a GPU",
    "b": "ratios of fused sampling",
    "c": "steps of training",
    "d": "profiles",
    "e": "kill and resume",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is run in a process of its own.

    Attributes:
        function: of `work`.
        values: its arguments.
        limit: in seconds; the process is killed after them.
    """

    function: str
    values: Mapping[str, Any]
    limit: float


def all_parts(*, pretend: bool) -> dict[str, Part]:
    """By name, in the order in which they are run: first what says whether anything is right, last what compiles."""
    own = _SMALL if pretend else _WHOLE
    parts = {"a": Part(function="marked_tests", values={}, limit=90)}
    parts["e"] = Part(function="kill_and_resume", values=own["resume"], limit=90)
    for how, options in COMPILED.items():
        if how == "graphs":  # after all that is not compiled
            parts |= _training(own["training"], own["trained_sizes"]) | _profiles(own)
        for model, sizes in SAMPLED.items():
            for images, size in sizes.items():
                if pretend and how != "eager" and images > 1:
                    continue  # nothing is compiled there
                values = {**size, **own["sampling"], **own["sizes"].get(model, {}), **options}
                values |= dict(model=model, images=images, baselines=_BASELINES if how == "eager" else ())
                limit = 120 if how == "eager" else 180
                parts[f"b-{model}-{how}-{images}"] = Part(function="sampling", values=values, limit=limit)
    return parts


def _training(values: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Part]:
    return {
        f"c-{model}-{algorithm}": Part(
            function="training",
            values={**values, **sizes.get(model, {}), "model": model, "algorithms": (algorithm,)},
            limit=75,
        )
        for model in ("sd15", "sd35")
        for algorithm in ("ddpo", "dpo")
    }


def _profiles(own: Mapping[str, Any]) -> dict[str, Part]:
    size = {**SAMPLED["sd15"][1], **own["sampling"], **own["sizes"].get("sd15", {}), "model": "sd15"}
    sampled = {**size, "images": 1, "adapters": (max(own["sampling"]["adapters"]),), "baselines": ()}
    trained = {**own["training"], "model": "sd15", "algorithms": ("ddpo",)}
    return {
        "d-sampling": Part(function="profile_sampling", values=sampled, limit=45),
        "d-training": Part(function="profile_training", values=trained, limit=45),
    }


_BASELINES = ("diffusion_blend", "set_adapters", "mixed_batch")
_WHOLE: dict[str, Any] = {
    "sampling": dict(adapters=(1, 2, 4, 8), steps=2, repeats=2, dtype="bfloat16"),
    "sizes": {},
    "trained_sizes": {},
    "training": dict(images=4, steps=10, resolution=512, repeats=2, dtype="bfloat16"),
    "resume": dict(base="emoji", images=8, steps=5),
}
_SMALL: dict[str, Any] = {
    "sampling": dict(adapters=(2,), steps=1, repeats=1, dtype="bfloat16", height=16, width=16),
    "sizes": {"sd35": dict(layers=1, height=32, width=32), "flux": dict(layers=2, height=32, width=32)},
    "trained_sizes": {"sd35": dict(layers=1)},
    "training": dict(images=2, steps=2, candidates=2, resolution=16, repeats=1, dtype="float32"),
    "resume": dict(base="", images=2, steps=2),
}


def chosen(names: Sequence[str], parts: Mapping[str, Part]) -> list[str]:
    """The parts of these names or beginnings of names, such as b or b-sdxl, in the order in which they are named.

    Raises:
        ValueError: for a name that is no part's.
    """
    found: dict[str, None] = {}
    for name in names:
        matches = [part for part in parts if part == name or part.startswith(f"{name}-")]
        if not matches:
            raise ValueError(f"no part {name!r}; expected some of {', '.join(parts)}, or beginnings such as b-sdxl")
        found |= dict.fromkeys(matches)
    return list(found)
