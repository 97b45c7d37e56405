"""Adapters that make sets and some that do not go with them, for tests that break them."""

from pathlib import Path

from stepfuse.fuse.diffusion.variance import EtaSchedule, TableSchedule
from tests.fixtures_tiny import save_adapter, save_stable_diffusion


def save_bases(root: Path) -> dict[str, Path]:
    """Three: `first`, one of its architecture with other weights, and one that is wider."""
    return {
        "first": save_stable_diffusion(root / "first"),
        "second": save_stable_diffusion(root / "second", seed=1),
        "wider": save_stable_diffusion(root / "wider", channels=(16, 48)),
    }


def save_adapters(root: Path, bases: dict[str, Path]) -> Path:
    """`a` and `b`, which make a set, and `c` of another base or guidance, which does not go with them."""
    first = bases["first"]
    save_adapter(root / "a", first, "a", variance=TableSchedule(etas=(0.2, 0.4)), num_inference_steps=2)
    save_adapter(root / "b", first, "b", seed=1, variance=EtaSchedule(eta=0.7), beta=0.5, num_inference_steps=4)
    save_adapter(root / "of-second", bases["second"], "c")
    save_adapter(root / "of-wider", bases["wider"], "c")
    save_adapter(root / "full", first, "c", guidance="full")
    save_adapter(root / "scale", first, "c", guidance_scale=7.0)
    return root
