"""The product of Gaussians and its special cases."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from stepfuse.fuse.diffusion.gaussian import Gaussian, Latents, product, total
from stepfuse.fuse.lora.mixture import Network, Rows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.checks import check_strength
from stepfuse.fuse.rules.options import ProductOptions
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.step import FusionStep


def soup_weights(step: FusionStep) -> Float[Tensor, "experts batch"]:
    """The weights b of the soup that equals the product to first order in the LoRAs, in the order of `plan.experts`.

        m_i = (terms of x_t) + k_i e_i,     k_i = sqrt(sigma_s² - v_i) - alpha_s sigma_t / alpha_t
        m* = (terms of x_t) + Σ u_i k_i e_i,     u_i = (a_i / v_i) / Σ_j (a_j / v_j)
        b_i = u_i k_i / Σ_j u_j k_j

    NaN for an image whose mean leaves the predictions out, Σ_j u_j k_j = 0, or has them with the sign turned, which
    strengths beyond 1 can do.
    """
    path, like = step.plan.path, torch.zeros(1, 1, dtype=torch.float64)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ((v.item() for v in path.at(x, like)) for x in (step.t, step.s))
    r, exponents = step.relative_variances(step.plan.experts), step.exponents()
    ancestral = path.ancestral_variance(step.t, step.s, like).item()
    # All but the used ones have exponent 0; their variance does not matter, and may be 0 where others are not.
    used = (exponents != 0).any(1)
    scale = torch.where(used, r, 1.0) if bool((r[used] > 0).all()) else torch.ones_like(r)
    u = exponents / scale[:, None]
    # Times alpha_t, which is 0 where flow matching starts.
    k = alpha_t * (sigma_s**2 - r * ancestral).clamp(min=0).sqrt() - alpha_s * sigma_t
    in_order = step.plan.batch_invariant
    shares = u / total(u, in_order=in_order) * k[:, None]
    whole = total(shares, in_order=in_order)
    return torch.where(whole < 0, shares / whole, torch.nan)


class Base(FusionRule):
    """p_ref: every adapter off, the weights and λ of no effect. Cost: one forward. Needs no reward."""

    name = "base"
    summary = "The base model alone, without any adapter."
    accepts = "none"

    def fuse(self, step: FusionStep) -> Gaussian:
        return step.gaussian(step.plan.base)


class ProductLaw(FusionRule):
    """The product of a step's experts, for the rules that are cases of it."""

    is_one_adapter = True

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength that leaves no positive precision at some step."""
        check_strength(plan)
        return plan

    def networks(self, step: FusionStep) -> Sequence[tuple[Network, Rows]]:
        return step.used_networks(step.used)

    def combine(self, step: FusionStep, predictions: Sequence[Latents]) -> Gaussian:
        return fuse_predictions(step, step.used, predictions)

    def average(self, step: FusionStep, predictions: Sequence[Latents]) -> Latents:
        return step.weighted(predictions)


@dataclass(frozen=True)
class Product(ProductLaw, ProductOptions):
    """p* ∝ p_ref^(1 - Σ a_i) Π p_i^(a_i), a_i = λ w_i (MSDDA, arXiv:2604.14379).

        1/v* = (1 - Σ a_i)/v_ref + Σ a_i/v_i,    m* = v* [ (1 - Σ a_i) m_ref/v_ref + Σ a_i m_i/v_i ]

    Cost: one forward for each objective whose weight is not 0, one more for the base where λ is not 1. Needs no reward.

    With a `gate`, in nats a step, steps where the set's profile measured KL( product ‖ soup ) ≤ gate take the one
    network Σ b_i B_i A_i for every expert's prediction (`soup_weights`), with v* as it is: one forward. An infinite
    gate takes it at every step, and needs no profile: for sets that were distilled.
    """

    name = "product"
    summary = "Multiplies the adapters' Gaussians at every step: the optimum for the weighted reward."

    @property
    def merges(self) -> Literal["", "weights"]:
        return "" if self.gate is None else "weights"

    @property
    def uses_gaps(self) -> bool:
        return self.gate is not None and math.isfinite(self.gate)

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a gate with a strength, for it was measured at 1, and for no positive precision."""
        if self.gate is not None and plan.strength != 1:
            raise ValueError(
                f"gate {self.gate:g} with strength {plan.strength:g}: gaps are measured at strength 1; "
                "leave out one of the two"
            )
        return super().prepare(plan)

    def fuse(self, step: FusionStep) -> Gaussian:
        if self.gate is None:
            return super().fuse(step)
        if not self.uses_gaps:
            return gated(step, torch.ones(len(step.x_t), dtype=torch.bool))
        assert step.plan.gaps is not None
        return gated(step, step.plan.gaps[step.step_index] <= self.gate)


class KL(ProductLaw):
    """p* ∝ p_ref^(1 - λ) p_i^λ: one adapter at another KL strength, λ in [0, 2] (DB-KLA, Diffusion Blend,
    arXiv:2505.18547).

    Published for equal variances, where it is the affine mean of the predicted noises; this is the product law for
    one objective, which is the same there and exact elsewhere. Cost: one forward where λ is 0 or 1, else two.
    Needs no reward.
    """

    name = "kl"
    summary = "One adapter alone, nearer to the base or further from it by the strength."
    accepts = "single"

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for several objectives, λ outside [0, 2], or no positive precision."""
        if not 0 <= plan.strength <= 2:
            raise ValueError(f"rule {self.name} with strength {plan.strength:g}; expected 0 to 2")
        several = ((plan.weights != 0).sum(1) != 1) | (plan.weights != plan.weights[:1]).any(1)
        if bool(several.any()):
            step_index, image = (int(i) for i in several.nonzero()[0])
            raise ValueError(
                f"rule {self.name} takes one objective and a strength, not weights {plan.label(step_index, image)}; "
                "use product for several"
            )
        return super().prepare(plan)


class Oracle(ProductLaw):
    """p_w, the one adapter that was trained on the weighted reward itself (MORL): what fusion is measured against.

    Found in the set by its weights, to three decimals; for all the weight on one objective it is the adapter of that
    objective. Cost: one forward, one more where λ is not 1. Needs no reward when sampling, but a training run for each
    mixture.
    """

    name = "oracle"
    summary = "An adapter that was trained for exactly these weights; what the other rules are compared with."
    accepts = "trained"

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for weights that no adapter of the set was trained on."""
        wanted = plan.weights[:, : len(plan.objectives)]
        if bool((wanted != wanted[:1]).any()):
            raise ValueError(f"rule {self.name} takes weights that stay the same over the steps")
        single = torch.eye(len(plan.objectives), dtype=torch.float64)
        trained = torch.cat([single, plan.oracle_weights.double()]) if plan.oracles else single
        distance = (wanted[0].T[:, None] - trained).abs().amax(2)
        nearest, found = distance.min(1)
        if bool((nearest > 1e-3).any()):
            image = int((nearest > 1e-3).nonzero()[0])
            have = "; ".join(
                ", ".join(f"{expert.name}={w:.3g}" for expert, w in zip(plan.objectives, row, strict=True) if w)
                for row in trained.tolist()
            )
            raise ValueError(
                f"no oracle for weights {plan.label(0, image)}: the set has adapters trained on {have}; "
                "train one on the reward weighted:… and add it with `stepfuse set create --oracle`"
            )
        selected = functional.one_hot(found, len(plan.adapters)).T.to(plan.weights)
        return super().prepare(replace(plan, weights=selected.expand_as(plan.weights)))


def fuse_predictions(step: FusionStep, experts: Sequence[Expert], predictions: Sequence[Latents]) -> Gaussian:
    """The product of experts with the step's exponents."""
    gaussians = [step.transition(e, step.variance(i)) for e, i in zip(predictions, experts, strict=True)]
    if len(gaussians) == 1 and not step.plan.batch_invariant and bool((step.exponents(experts) == 1).all()):
        return gaussians[0]
    deterministic = step.is_deterministic(experts)
    relative = None if deterministic is False else step.relative_variances(experts)
    return product(
        gaussians,
        step.device_exponents(experts),
        relative_variances=relative,
        deterministic=deterministic,
        in_order=step.plan.batch_invariant,
    )


def gated(step: FusionStep, soup: Bool[Tensor, " batch"]) -> Gaussian:
    """The product, for some images with the soup's prediction in place of every expert's."""
    used, weights = step.used, soup_weights(step)
    # One expert alone costs no more than a soup, and is exact.
    soup = soup & ((step.exponents() != 0).sum(0) > 1) & weights.isfinite().all(0)
    soups = step.soups(weights[:-1, soup])
    rows = [((a != 0) & ~soup).nonzero().flatten() for a in step.exponents(used)]
    rows += [soup.nonzero().flatten()[some] for _, some in soups]
    predictions = step.predict([*(expert.network for expert in used), *(network for network, _ in soups)], rows)
    shared = sum(predictions[len(used) :], step.x_t.new_zeros(()))
    return fuse_predictions(step, used, [e + shared for e in predictions[: len(used)]])
