"""A network and its adapters, compiled once for all weights and adapters."""

from typing import Any

import torch

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.denoiser import Denoiser


def compile_batched(denoiser: Denoiser, how: str, rows: int, **options: Any) -> None:
    """Compile a network and its batched adapters in place.

    Weights, strengths, schedules and adapters in use are values to it: other ones compile nothing anew. A soup is
    another network than adapters one a row; and a second number of rows in a batch compiles once more, as a single row
    does, but no third. Torch's limit of graphs for one piece of code becomes 64, for blocks of all widths share theirs.

    Args:
        how: `regional` or `full`, see `compile_network`.
        rows: the most rows of a batch foreseen; more compile once more.
        options: for `torch.compile`; on a GPU mode="reduce-overhead" (CUDA graphs) is faster.

    Raises:
        ValueError: for another word, or without batched forwards.
    """
    if how not in ("regional", "full"):
        raise ValueError(f"compile {how!r}; expected regional or full")
    if denoiser.batched is None:
        raise ValueError("only batched forwards compile without doing so for each adapter; use forwards='batched'")
    denoiser.batched.fix(rows, denoiser.backbone.device)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compile_network(denoiser.backbone, how, fullgraph=True, **options)


def compile_network(backbone: Backbone, how: str, **options: Any) -> None:
    """Compile a network in place, with these options of `torch.compile`.

    `regional`: the blocks that it repeats, once for each width, in seconds; `full`: all of it, in minutes.
    """
    if how == "full":
        backbone.network.compile(**options)
        return
    blocks = [module for module in backbone.network.modules() if type(module).__name__ in backbone.blocks]
    if not blocks:
        raise ValueError(f"the network has no blocks to compile ({', '.join(backbone.blocks)}); compile it in full")
    for block in blocks:
        block.compile(**options)
