"""LoRAs of layers that other tools have as one, such as the queries, keys and values of an attention.

    W = (W_1; W_2; …)      ΔW = (s_1 B_1 A_1; s_2 B_2 A_2; …)

`join` makes one layer of several: A = (A_1; A_2; …) and B = diag(s_1 B_1, s_2 B_2, …), of rank Σ r_j, as
kohya-ss/sd-scripts (networks/lora_flux.py) does; where all A_j are the same, that A and B = (s_1 B_1; s_2 B_2; …).
`split` is the inverse: layer j has the rows of B that are its own, without the columns that are zero there, and the
rows of A that belong to those columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stepfuse.fuse.lora.factors import Factors, scale_to_one
from stepfuse.fuse.lora.keys import DOWN
from stepfuse.fuse.lora.names import LayerNames, Original


def join_all(factors: Mapping[str, Factors], names: LayerNames) -> dict[str, Factors]:
    """The layers of a LoRA under their names in kohya's files; ValueError for one that has no name there."""
    originals = {names.kohya(module): names.in_kohya(module) for module in factors}
    return {
        name: join({module: factors[module] for module in original.modules if module in factors}, original)
        for name, original in originals.items()
    }


def join(layers: Mapping[str, Factors], original: Original) -> Factors:
    """The layer that these layers of diffusers' network are parts of; of scale 1 if it is made of several.

    Args:
        layers: by their path, without magnitudes and biases; those of `original` that are missing have no LoRA.
    """
    if len(original.modules) == 1:
        (layer,) = layers.values()
        return _swap_halves(layer) if original.swapped else layer
    scaled = {module: scale_to_one(layer) for module, layer in layers.items()}
    downs = [layer.down for layer in scaled.values()]
    shared = all(down.dtype == downs[0].dtype and torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if shared else torch.cat(downs)
    ups = [
        scaled[module].up if module in scaled else down.new_zeros(rows, len(down) if shared else 0)
        for module, rows in zip(original.modules, original.rows, strict=True)
    ]
    return Factors(down=down, up=torch.cat(ups) if shared else torch.block_diag(*ups), alpha=float(len(down)))


def split(layer: Factors, original: Original, rows: Sequence[int]) -> dict[str, Factors]:
    """The layers of diffusers' network that a layer is made of, without those that the LoRA does not change.

    Args:
        rows: of each of `original.modules`.
    """
    if len(original.modules) == 1:
        return {original.modules[0]: _swap_halves(layer) if original.swapped else layer}
    pieces = {kind: value.split(list(rows)) for kind, value in _by_rows(layer).items()}
    whole = {
        module: _replace(layer, {kind: piece[index] for kind, piece in pieces.items()}).map(Tensor.clone)
        for index, module in enumerate(original.modules)
    }
    parts = {}
    for module, part in whole.items():
        used = part.up.ne(0).any(0)
        if not part.dora and not part.has_bias and not bool(used.all()):
            alpha = layer.alpha * int(used.sum()) / layer.rank
            part = replace(part, down=part.down[used], up=part.up[:, used], alpha=alpha)
        if part.rank:
            parts[module] = part
    return parts or whole


def _by_rows(layer: Factors) -> dict[str, Tensor]:
    """The tensors, by kind, that have a row for each row of the weight."""
    return {kind: value for kind, value in layer.tensors.items() if kind != DOWN}


def _swap_halves(layer: Factors) -> Factors:
    return _replace(layer, {kind: value.roll(len(value) // 2, 0) for kind, value in _by_rows(layer).items()})


def _replace(layer: Factors, tensors: Mapping[str, Tensor]) -> Factors:
    return Factors.of({**layer.tensors, **tensors}, layer.alpha)
