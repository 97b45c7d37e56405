"""Compiled networks."""

from typing import Any

from stepfuse.fuse.backbones.base import Backbone


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
