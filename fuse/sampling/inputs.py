"""Prompts, negative prompts and their embeddings, as they are given to a sampler."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stepfuse.fuse.backbones.base import Backbone


def check_texts(backbone: Backbone, texts: Mapping[str, Any], embeds: Mapping[str, Tensor]) -> None:
    """Check that nothing is missing or given twice, as diffusers' pipelines do.

    Args:
        texts: `prompt` and `negative_prompt`, or None for one that is not given.
        embeds: those that are given, by the names of diffusers' arguments.
    """
    if texts["prompt"] is None and "prompt_embeds" not in embeds:
        raise ValueError("no prompt; give prompt or prompt_embeds")
    for name, text in texts.items():
        if text is not None and f"{name}_embeds" in embeds:
            raise ValueError(f"both {name} and {name}_embeds are given; give one of the two")
    backbone.check_embeds(list(embeds))
    shapes = {name: tuple(value.shape) for name, value in embeds.items() if "pooled" not in name}
    if len(set(shapes.values())) > 1:
        stated = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{stated} differ in shape; expected one shape")


def negative_prompts(given: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """One negative prompt an image: those given, or the same for all."""
    negatives = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(negatives) != count:
        raise ValueError(f"{len(negatives)} negative prompts for {count} prompts; expected 1 or {count}")
    return negatives


def repeat(values: Sequence[Any], count: int) -> list[Any]:
    """a a b b."""
    return [value for value in values for _ in range(count)]
