"""A UNet and its adapters, compiled once for all weights and adapters."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from stepfuse.fuse.lora.batched import BatchedAdapters


def compile_unet(
    unet: UNet2DConditionModel, batched: object, how: str, rows: int, device: torch.device, **options: Any
) -> None:
    """Compile in place. Weights, strengths, schedules and adapters in use are values to it: other ones compile nothing
    anew. A soup is another network than adapters one a row; and a second number of rows in a batch compiles once more,
    as a single row does, but no third.

    Raises torch's limit of graphs for one piece of code to 64, for blocks of all widths share theirs.

    Args:
        batched: what runs the adapters, which must be `BatchedAdapters`.
        how: `regional`, the transformer blocks, once each width: in seconds; or `full`, the whole UNet: in minutes, and
            faster on a GPU with mode="reduce-overhead" (CUDA graphs).
        rows: the most rows of a batch foreseen; more compile once more.
        options: for `torch.compile`.

    Raises:
        ValueError: for another word, or without batched forwards.
    """
    if how not in ("regional", "full"):
        raise ValueError(f"compile {how!r}; expected regional or full")
    if not isinstance(batched, BatchedAdapters):
        raise ValueError("only batched forwards compile without doing so for each adapter; use forwards='batched'")
    batched.fix(rows, device)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if how == "regional":
        unet.compile_repeated_blocks(fullgraph=True, **options)
    else:
        unet.compile(fullgraph=True, **options)
