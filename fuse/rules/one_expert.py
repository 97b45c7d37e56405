"""Rules that select one expert for each image and step."""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.step import FusionStep


def systematic_choices(
    exponents: Float[Tensor, "steps experts batch"], uniforms: Float[Tensor, "batch draws"]
) -> Int[Tensor, "steps batch"]:
    """The index of the expert that each image takes at each step, by credit from a random phase.

    A step moves the credit vector c, of sum 0, by a - e_chosen: modulo the differences e_i - e_j a rotation of the
    torus, which keeps the uniform distribution. So a uniform phase Σ_{i<n} u_i (e_i - e_n), brought to where the rule
    keeps credits, makes every expert's chance a_i at every step. Where the exponents change, credit begins anew.
    """
    steps, experts, batch = exponents.shape
    mixtures, which = torch.unique(exponents.flatten(0, 1), dim=1, return_inverse=True)
    choices = torch.zeros(steps, batch, dtype=torch.int64)
    for column, mixture in enumerate(mixtures.T.unflatten(1, (steps, experts))):
        rows = (which == column).nonzero().flatten()
        changes = (mixture[1:] != mixture[:-1]).any(1).nonzero().flatten() + 1
        for begin, end in pairwise([0, *changes.tolist(), steps]):
            choices[begin:end, rows] = _choices_by_credit(mixture[begin], end - begin, uniforms[rows])
    return choices


def _choices_by_credit(
    a: Float[Tensor, " experts"], rounds: int, uniforms: Float[Tensor, "rows draws"]
) -> Int[Tensor, "rounds rows"]:
    """The indices chosen in so many rounds; experts of exponent 0 take no part."""
    active = a.nonzero().flatten()
    count, every = len(active), torch.arange(len(uniforms))
    phase = uniforms[:, : count - 1].double()
    credit = torch.cat([phase, -phase.sum(1, keepdim=True)], 1)
    while bool((far := credit.amax(1) - credit.amin(1) > 1 + 1e-9).any()):  # to the lattice's Voronoi cell at 0
        rows = every[far]
        credit[rows, credit[rows].argmax(1)] -= 1
        credit[rows, credit[rows].argmin(1)] += 1
    choices = []
    for _ in range(8 * count + rounds):  # from there the rule's region is a few rounds away
        credit += a[active].double()
        choices.append(credit.argmax(1))
        credit[every, choices[-1]] -= 1
    return active[torch.stack(choices[-rounds:])]


class OneExpert(FusionRule):
    """For rules that select one expert at random, with the exponents as probabilities."""

    is_one_adapter = True

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for exponents that are no probabilities."""
        if not 0 <= plan.strength <= 1:
            raise ValueError(
                f"rule {self.name} with strength {plan.strength:g}; it selects experts at random, so expected 0 to 1"
            )
        if bool((plan.weights < 0).any()):
            step_index, _, image = (int(i) for i in (plan.weights < 0).nonzero()[0])
            raise ValueError(f"rule {self.name} with weights {plan.label(step_index, image)}; expected none below 0")
        return plan


class Switch(OneExpert):
    """One expert a step and image, drawn independently with probability a_i (DB-MPA-LS, Diffusion Blend,
    arXiv:2505.18547), the base with 1 - Σ a_i.

    Cost: one forward. Needs no reward.
    """

    name = "switch"
    summary = "Each step uses one adapter, chosen at random with the weights as chances."

    def fuse(self, step: FusionStep) -> Gaussian:
        exponents = step.exponents()
        cumulative = exponents.cumsum(0)
        u = step.uniforms[:, step.step_index].to(cumulative)
        # The last positive one takes what rounding leaves above the sum.
        last = len(exponents) - 1 - (exponents.flip(0) > 0).to(torch.int64).argmax(0)
        return step.select_expert(torch.minimum((cumulative <= u).sum(0), last))


class Systematic(OneExpert):
    """One expert a step and image by credit: credit += a, the largest is chosen, and pays 1; random phase an image.

    Each expert is chosen with probability a_i at every step, as in `switch`, but any window of the run in which the
    weights stay the same holds its due share within about one step, so the run stays closer to the blend. (Systematic
    sampling; the credit rule is that of smooth weighted round-robin schedulers.) Cost: one forward. Needs no reward.
    """

    name = "systematic"
    summary = "Each step uses one adapter; they take turns, as often as their weights say."

    def fuse(self, step: FusionStep) -> Gaussian:
        if "choices" not in step.memory:
            step.memory["choices"] = systematic_choices(step.plan.exponents, step.uniforms)
        return step.select_expert(step.memory["choices"][step.step_index])
