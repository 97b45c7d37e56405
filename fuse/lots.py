"""Which one expert an image takes at a step."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def systematic_choice(
    exponents: Float[Tensor, "steps places batch"], uniforms: Float[Tensor, "batch draws"]
) -> Int[Tensor, " batch"]:
    """The place each image takes at the last of these steps, by credit from a random phase.

    A step moves the credit vector c, of sum 0, by a - e_chosen: modulo the differences e_i - e_j a rotation of the
    torus, which keeps the uniform distribution. So a uniform phase Σ_{i<n} u_i (e_i - e_n), brought to where the rule
    keeps credits, makes every expert's chance a_i at every step. Where the exponents change, credit begins anew.
    """
    stages, batch = len(exponents), exponents.shape[2]
    mixtures, which = torch.unique(exponents.flatten(0, 1), dim=1, return_inverse=True)
    choice = torch.zeros(batch, dtype=torch.int64)
    for column, mixture in enumerate(mixtures.unflatten(0, (stages, -1)).unbind(-1)):
        rows = (which == column).nonzero().flatten()
        changed = (mixture != mixture[-1]).any(1).nonzero().flatten()
        since = stages - (int(changed[-1]) + 1 if len(changed) else 0)
        choice[rows] = _choice_by_credit(mixture[-1], since, uniforms[rows])
    return choice


def _choice_by_credit(
    a: Float[Tensor, " places"], rounds: int, uniforms: Float[Tensor, "rows draws"]
) -> Int[Tensor, " rows"]:
    """The place chosen in the last of these rounds; experts of exponent 0 take no part."""
    active = a.nonzero().flatten()
    count, every = len(active), torch.arange(len(uniforms))
    phase = uniforms[:, : count - 1].double()
    credit = torch.cat([phase, -phase.sum(1, keepdim=True)], 1)
    while bool((far := credit.amax(1) - credit.amin(1) > 1 + 1e-9).any()):  # to the lattice's Voronoi cell at 0
        rows = every[far]
        credit[rows, credit[rows].argmax(1)] -= 1
        credit[rows, credit[rows].argmin(1)] += 1
    choice = torch.zeros(len(uniforms), dtype=torch.int64)
    for _ in range(8 * count + rounds):  # from there the rule's own region is a few rounds away
        credit += a[active].double()
        choice = credit.argmax(1)
        credit[every, choice] -= 1
    return active[choice]
