"""Which one expert an image takes at a step."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor


def systematic_choices(
    exponents: Float[Tensor, "steps places batch"], uniforms: Float[Tensor, "batch draws"]
) -> Int[Tensor, "steps batch"]:
    """The place each image takes at each step, by credit from a random phase.

    A step moves the credit vector c, of sum 0, by a - e_chosen: modulo the differences e_i - e_j a rotation of the
    torus, which keeps the uniform distribution. So a uniform phase Σ_{i<n} u_i (e_i - e_n), brought to where the rule
    keeps credits, makes every expert's chance a_i at every step. Where the exponents change, credit begins anew.
    """
    steps, places, batch = exponents.shape
    mixtures, which = torch.unique(exponents.flatten(0, 1), dim=1, return_inverse=True)
    choices = torch.zeros(steps, batch, dtype=torch.int64)
    for column, mixture in enumerate(mixtures.T.unflatten(1, (steps, places))):
        rows = (which == column).nonzero().flatten()
        changes = (mixture[1:] != mixture[:-1]).any(1).nonzero().flatten() + 1
        for begin, end in pairwise([0, *changes.tolist(), steps]):
            choices[begin:end, rows] = _choices_by_credit(mixture[begin], end - begin, uniforms[rows])
    return choices


def _choices_by_credit(
    a: Float[Tensor, " places"], rounds: int, uniforms: Float[Tensor, "rows draws"]
) -> Int[Tensor, "rounds rows"]:
    """The places chosen in so many rounds; experts of exponent 0 take no part."""
    active = a.nonzero().flatten()
    count, every = len(active), torch.arange(len(uniforms))
    phase = uniforms[:, : count - 1].double()
    credit = torch.cat([phase, -phase.sum(1, keepdim=True)], 1)
    while bool((far := credit.amax(1) - credit.amin(1) > 1 + 1e-9).any()):  # to the lattice's Voronoi cell at 0
        rows = every[far]
        credit[rows, credit[rows].argmax(1)] -= 1
        credit[rows, credit[rows].argmin(1)] += 1
    choices = []
    for _ in range(8 * count + rounds):  # from there the rule's own region is a few rounds away
        credit += a[active].double()
        choices.append(credit.argmax(1))
        credit[every, choices[-1]] -= 1
    return active[torch.stack(choices[-rounds:])]
