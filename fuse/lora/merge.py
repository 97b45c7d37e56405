"""Several LoRAs as one: the exact soup, or the nearest to it of a rank."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepfuse.fuse.lora.factors import Factors


def merge_factors(
    adapters: Sequence[tuple[str, float, Mapping[str, Factors]]], rank: int | None = None
) -> tuple[dict[str, Factors], float]:
    """The soup Σ w_i s_i B_i A_i as one LoRA of scaling 1, and how far rounding it to a rank takes it.

        B = [w_1 s_1 B_1, …, w_N s_N B_N],  A = [A_1; …; A_N]:  B A = Σ w_i s_i B_i A_i,  of rank Σ r_i

    Args:
        adapters: names, weights and layers.
        rank: keep so many singular values a layer (the nearest of that rank, Eckart and Young 1936); by default all.

    Returns:
        Layers, and ‖kept - exact‖ / ‖exact‖ over all layers, Frobenius; 0 without a rank.

    Raises:
        ValueError: for a DoRA, which is not linear in its weight, a bias, or a rank below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}; expected 1 or more")
    used = [(name, weight, factors) for name, weight, factors in adapters if weight]
    for name, _, factors in used:
        for layer in factors.values():
            if layer.dora or layer.has_bias:
                what = "a LoRA with a bias" if layer.has_bias else "a DoRA"
                raise ValueError(f"adapter {name!r} is {what}, which cannot be merged by weight; give it weight 0")
    merged, dropped, total = {}, 0.0, 0.0
    for module in sorted({module for _, _, factors in used for module in factors}):
        layers = [(weight, factors[module]) for _, weight, factors in used if module in factors]
        down = torch.cat([layer.down.double() for _, layer in layers])
        up = torch.cat([weight * layer.scaling * layer.up.double() for weight, layer in layers], dim=1)
        if rank is not None:
            down, up, values = _truncate(down, up, rank)
            dropped += values[rank:].square().sum().item()
            total += values.square().sum().item()
        merged[module] = Factors(down=down.float(), up=up.float(), alpha=float(len(down)))
    return merged, (dropped / total) ** 0.5 if total else 0.0


def _truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest of a rank to B A, from the singular values of the small product of triangles."""
    left, upper = torch.linalg.qr(up.flatten(1))
    right, lower = torch.linalg.qr(down.flatten(1).T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = S[:rank].sqrt()
    A = (root[:, None] * Vh[:rank]) @ right.T
    B = left @ (U[:, :rank] * root)
    return A.reshape(-1, *down.shape[1:]), B.reshape(len(up), -1, *up.shape[2:]), S
