"""Fusion rules: from the base and the adapters to the one Gaussian that a step samples.

Each states its equation, its source, its cost in forwards a step, and whether it needs a reward. A forward is one
evaluation of the network on one image; guidance adds the unconditional ones (one a step and image where it is
shared, one to each forward where it is full).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from stepfuse.data.names import nearest
from stepfuse.fuse.gate import soup_weights
from stepfuse.fuse.gaussian import Gaussian, product
from stepfuse.fuse.limits import (
    check_average_variance,
    check_no_strength,
    check_probabilities,
    check_random,
    check_strength,
)
from stepfuse.fuse.lots import systematic_choices
from stepfuse.fuse.plan import FusionStep, Latents, Plan


class FusionRule(Protocol):
    """How the experts of a step become the Gaussian that is sampled.

    `prepare` sees the whole run before anything is sampled: it refuses what the rule cannot do, naming the remedy,
    and may rewrite the plan. Calling the rule fuses one step.

    A rule may have attributes that say what it needs of the sampler, which then sees to it before `prepare`: `needs`,
    "rewards" or their "gradients"; `merges`, adapters that can be merged by "weights" or by "factors"; `gate`, the
    set's gap profile.
    """

    def prepare(self, plan: Plan) -> Plan: ...

    def __call__(self, step: FusionStep) -> Gaussian: ...


class ProductLaw:
    """The product of a step's experts, for the rules that are cases of it."""

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength that leaves no positive precision at some step."""
        check_strength(plan)
        return plan

    def __call__(self, step: FusionStep) -> Gaussian:
        places = step.used
        return fused(step, places, step.gaussians(places))


@dataclass(frozen=True)
class Product(ProductLaw):
    """p* ∝ p_ref^(1 - Σ a_i) Π p_i^(a_i), a_i = λ w_i (MSDDA, arXiv:2604.14379).

        1/v* = (1 - Σ a_i)/v_ref + Σ a_i/v_i,    m* = v* [ (1 - Σ a_i) m_ref/v_ref + Σ a_i m_i/v_i ]

    Cost: one forward for each objective whose weight is not 0, one more for the base where λ is not 1. Needs no reward.

    With a gate, steps where the set's profile measured KL( product ‖ soup ) ≤ gate take the one network
    Σ b_i B_i A_i for every expert's prediction (`stepfuse.fuse.gate.soup_weights`), with v* as it is: one forward.

    Attributes:
        gate: in nats a step; None runs every expert at every step.
    """

    gate: float | None = None

    @property
    def merges(self) -> str:
        return "" if self.gate is None else "weights"

    def __post_init__(self) -> None:
        if self.gate is not None and not (isinstance(self.gate, int | float) and self.gate >= 0):
            raise ValueError(f"gate {self.gate!r}; expected a number of nats, 0 or more")

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a gate with a strength, for it was measured at 1, and for no positive precision."""
        if self.gate is not None and plan.strength != 1:
            raise ValueError(f"gate {self.gate:g} with strength {plan.strength:g}: gaps are measured at strength 1")
        return super().prepare(plan)

    def __call__(self, step: FusionStep) -> Gaussian:
        if self.gate is None:
            return super().__call__(step)
        assert step.plan.gaps is not None
        return gated(step, step.plan.gaps[step.number] <= self.gate)


@dataclass(frozen=True)
class Base(ProductLaw):
    """p_ref: every adapter off, the weights and λ of no effect. Cost: one forward. Needs no reward."""

    def prepare(self, plan: Plan) -> Plan:
        return replace(plan, strength=0.0)


@dataclass(frozen=True)
class KL(ProductLaw):
    """p* ∝ p_ref^(1 - λ) p_i^λ: one adapter at another KL strength, λ in [0, 2] (DB-KLA, Diffusion Blend,
    arXiv:2505.18547).

    Published for equal variances, where it is the affine mean of the predicted noises; this is the product law for
    one objective, which is the same there and exact elsewhere. Cost: one forward where λ is 0 or 1, else two.
    Needs no reward.
    """

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for several objectives, λ outside [0, 2], or no positive precision."""
        if not 0 <= plan.strength <= 2:
            raise ValueError(f"rule kl with strength {plan.strength:g}; expected 0 to 2")
        several = ((plan.weights != 0).sum(1) != 1) | (plan.weights != plan.weights[:1]).any(1)
        if bool(several.any()):
            number, image = (int(i) for i in several.nonzero()[0])
            raise ValueError(
                f"rule kl takes one objective and a strength, not weights {plan.label(number, image)}; "
                "use product for several"
            )
        return super().prepare(plan)


@dataclass(frozen=True)
class Oracle(ProductLaw):
    """p_w, the one adapter that was trained on the weighted reward itself (MORL): what fusion is measured against.

    Found in the set by its weights, to three decimals; for all the weight on one objective it is that objective's own
    adapter. Cost: one forward, one more where λ is not 1. Needs no reward when sampling, but a training run for each
    mixture.
    """

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for weights that no adapter of the set was trained on."""
        wanted = plan.weights[:, : plan.objectives]
        if bool((wanted != wanted[:1]).any()):
            raise ValueError("rule oracle takes weights that stay the same over the steps")
        single = torch.eye(plan.objectives, dtype=torch.float64)
        trained = torch.cat([single, plan.oracles.double()]) if len(plan.oracles) else single
        distance = (wanted[0].T[:, None] - trained).abs().amax(2)
        nearest, found = distance.min(1)
        if bool((nearest > 1e-3).any()):
            image = int((nearest > 1e-3).nonzero()[0])
            have = "; ".join(
                ", ".join(f"{n}={w:.3g}" for n, w in zip(plan.names, row, strict=False) if w)
                for row in trained.tolist()
            )
            raise ValueError(
                f"no oracle for weights {plan.label(0, image)}: the set has adapters trained on {have}; "
                "train one on the reward weighted:… and add it with `stepfuse set create --oracle`"
            )
        chosen = functional.one_hot(found, len(plan.names)).T.to(plan.weights)
        return super().prepare(replace(plan, weights=chosen.expand_as(plan.weights)))


@dataclass(frozen=True)
class AverageNoise:
    """e = Σ a_i e_i + (1 - Σ a_i) e_ref, predicted noises averaged (DB-MPA, Diffusion Blend, arXiv:2505.18547).

    Published for one variance schedule. Where the objectives' differ, the step's variance is their average,
    v = Σ a_i v_i + (1 - Σ a_i) v_ref; where they are equal this is `product`. Cost: as `product`. Needs no reward.
    """

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength whose average variance leaves [0, sigma_s²]."""
        check_average_variance(plan)
        return plan

    def __call__(self, step: FusionStep) -> Gaussian:
        places = step.used
        exponents = step.exponents[places]
        return step.transition(average(step.predict_used(places), exponents), average_variance(step))


@dataclass(frozen=True)
class Soup:
    """One network with the LoRA Σ a_i B_i A_i, exactly (Rewarded Soup, arXiv:2306.04488); variance as `average_noise`.

    To first order in the LoRAs its prediction is that of `average_noise`. Weights may differ between the images of a
    batch. Cost: one forward. Needs no reward.
    """

    merges: ClassVar[str] = "weights"

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength whose average variance leaves [0, sigma_s²]."""
        check_average_variance(plan)
        return plan

    def __call__(self, step: FusionStep) -> Gaussian:
        weights = step.exponents[: step.plan.base]
        mixtures, which = torch.unique(weights, dim=1, return_inverse=True)
        lasting = mixtures.shape[1] == 1 and bool((step.plan.exponents == step.exponents).all())
        factors = self.merges == "factors"
        merges = [step.plan.merge(row, factors=factors, lasting=lasting) for row in mixtures.T.tolist()]
        predictions = step.predict_some(merges, [(which == i).nonzero().flatten() for i in range(len(merges))])
        return step.transition(sum(predictions, torch.zeros(()).to(step.x_t)), average_variance(step))


@dataclass(frozen=True)
class SoupFactors(Soup):
    """One network with the LoRA λ (Σ w_i B_i) (Σ w_i A_i): the factors averaged, as Diffusion Blend's code does.

    Not the average of the LoRAs: products of different objectives' factors come in. Kept because published numbers of
    "Rewarded Soup" come from it. Takes adapters of one rank and alpha. Cost: one forward. Needs no reward.
    """

    merges: ClassVar[str] = "factors"


@dataclass(frozen=True)
class Switch:
    """One expert a step and image, drawn independently with probability a_i (DB-MPA-LS, Diffusion Blend,
    arXiv:2505.18547), the base with 1 - Σ a_i.

    Cost: one forward. Needs no reward.
    """

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for exponents that are no probabilities."""
        check_probabilities(plan, "switch")
        return plan

    def __call__(self, step: FusionStep) -> Gaussian:
        cumulative = step.exponents.cumsum(0)
        u = step.uniforms[:, step.number].to(cumulative)
        # The last positive one takes what rounding leaves above the sum.
        choice = (cumulative <= u).sum(0).clamp(max=step.plan.base)
        last = step.plan.base - (step.exponents.flip(0) > 0).to(torch.int64).argmax(0)
        return step.chosen(torch.minimum(choice, last))


@dataclass(frozen=True)
class Systematic:
    """One expert a step and image by credit: credit += a, the largest is chosen, and pays 1; random phase an image.

    Each expert is chosen with probability a_i at every step, as in `switch`, but any window of the run in which the
    weights stay the same holds its due share within about one step, so the run stays closer to the blend. (Systematic
    sampling; the credit rule is that of smooth weighted round-robin schedulers.) Cost: one forward. Needs no reward.
    """

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for exponents that are no probabilities."""
        check_probabilities(plan, "systematic")
        return plan

    def __call__(self, step: FusionStep) -> Gaussian:
        if "choices" not in step.memory:
            step.memory["choices"] = systematic_choices(step.plan.exponents, step.uniforms)
        return step.chosen(step.memory["choices"][step.number])


@dataclass(frozen=True)
class RewardGradientGuidance(Base):
    """x_s = (a draw of p_ref) + λ_k v Σ w_i g_i, g_i = ∇ r_i(x_0(x_t)) normalised over channels at each pixel
    (the RGG baseline of Diffusion Blend, arXiv:2505.18547), λ_k = min((1 + growth)^k - 1, 1).

    x_0 is the base's prediction, its noise held fixed, so the gradient goes through the decoder and the reward, not the
    network. k counts in units of a run of 50 steps, as published. Cost: one forward of the base, and for each objective
    whose weight is not 0 one decoding and one reward with their gradients. Needs differentiable rewards.

    Attributes:
        growth: 0.024 in the commands of the Diffusion Blend code.
    """

    growth: float = 0.024
    needs: ClassVar[str] = "gradients"

    def __post_init__(self) -> None:
        if not isinstance(self.growth, int | float) or not 0 < self.growth < float("inf"):
            raise ValueError(f"growth {self.growth!r}; expected a positive number")

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength, for the base is not tilted by λ here, and for a base without noise."""
        check_no_strength(plan, "rgg")
        check_random(plan, "rgg", "it moves a step by a multiple of its variance")
        return super().prepare(plan)

    def __call__(self, step: FusionStep) -> Gaussian:
        (prediction,) = step.predict([step.plan.base])
        gaussian = step.transition(prediction, step.variance(step.plan.base))
        return replace(gaussian, mean=gaussian.mean + self.shift(step, prediction, gaussian.variance))

    def shift(self, step: FusionStep, prediction: Latents, variance: Tensor) -> Latents:
        """λ_k v Σ w_i g_i."""
        clean, _ = step.plan.path.clean_and_noise(step.x_t, prediction, step.t)
        images = torch.arange(len(clean)) if step.rows is None else step.rows
        weights = step.plan.weights[step.number].to(clean)
        total = torch.zeros_like(clean)
        for place, score in enumerate(step.rewards):
            if bool((weights[place] != 0).any()):
                with torch.enable_grad():
                    x_0 = clean.detach().requires_grad_()
                    (gradient,) = torch.autograd.grad(score(x_0, images).sum(), x_0)
                g = functional.normalize(gradient, dim=1)
                total += weights[place].reshape(-1, *[1] * (clean.ndim - 1)) * g
        k = step.number * 50 / len(step.plan.steps)
        return min((1 + self.growth) ** k - 1, 1.0) * variance * total


@dataclass(frozen=True)
class CoDe(Base):
    """Blockwise best of N (CoDe, arXiv:2502.00968): the base unrolled N times through a block of B steps, the
    candidate kept whose predicted x_0 has the largest Σ w_i r_i / σ_i.

    Cost: N forwards a step, one in the first; a reward of N candidates a block. Needs rewards.

    Attributes:
        candidates: N; 1 is the base.
        block_size: B, the steps between choices; the last block may be shorter.
    """

    candidates: int = 20
    block_size: int = 5
    needs: ClassVar[str] = "rewards"

    def __post_init__(self) -> None:
        for name in ("candidates", "block_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value!r}; expected a whole number, 1 or more")

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength, for the choice has none, and for a base without noise."""
        check_no_strength(plan, "code")
        if self.candidates > 1:
            check_random(plan, "code", "its candidates would be alike")
        return super().prepare(plan)


RULES: dict[str, type[FusionRule]] = {
    "base": Base,
    "product": Product,
    "average_noise": AverageNoise,
    "kl": KL,
    "switch": Switch,
    "systematic": Systematic,
    "soup": Soup,
    "soup_factors": SoupFactors,
    "code": CoDe,
    "rgg": RewardGradientGuidance,
    "oracle": Oracle,
}


def get_rule(name: str, **options: Any) -> FusionRule:
    """A rule by its name in `RULES`.

    Args:
        options: fields of the rule, `candidates=8` of `code` for instance.

    Raises:
        ValueError: for a name that is not there, or an option the rule does not have.
    """
    if name not in RULES:
        raise ValueError(f"no fusion rule {name!r}; expected one of {', '.join(RULES)}{nearest(name, RULES)}")
    rule: Any = RULES[name]
    fields = [f.name for f in dataclasses.fields(rule)] if dataclasses.is_dataclass(rule) else []
    for option in options:
        if option not in fields:
            raise ValueError(
                f"rule {name} has no option {option!r}; it has {', '.join(fields) or 'none'}{nearest(option, fields)}"
            )
    return rule(**options)


# What rules have in common --------------------------------------------------------------------


def fused(step: FusionStep, places: Sequence[int], gaussians: Sequence[Gaussian]) -> Gaussian:
    """The product of experts with the step's exponents."""
    exponents = step.exponents[places]
    if len(gaussians) == 1 and bool((exponents == 1).all()):
        return gaussians[0]
    return product(gaussians, exponents, relative_variances=step.relative(places))


def gated(step: FusionStep, soup: Bool[Tensor, " batch"]) -> Gaussian:
    """The product, for some images with the soup's prediction for every expert's."""
    places = step.used
    weights = soup_weights(step)
    # One expert alone costs no more than a soup, and is exact.
    soup = soup & ((step.exponents != 0).sum(0) > 1) & weights.isfinite().all(0)
    mixtures, which = torch.unique(weights[:-1, soup], dim=1, return_inverse=True)
    merges = [step.plan.merge(mixture) for mixture in mixtures.T.tolist()]
    rows = soup.nonzero().flatten()
    own = [((step.exponents[place] != 0) & ~soup).nonzero().flatten() for place in places]
    predictions = step.predict_some([*places, *merges], [*own, *(rows[which == i] for i in range(len(merges)))])
    shared = sum(predictions[len(places) :], torch.zeros(()).to(step.x_t))
    gaussians = [
        step.transition(e + shared, step.variance(i)) for e, i in zip(predictions[: len(places)], places, strict=True)
    ]
    return fused(step, places, gaussians)


def average(predictions: Sequence[Latents], exponents: Float[Tensor, "experts batch"]) -> Latents:
    """Σ a_i e_i."""
    a = exponents.to(predictions[0]).reshape(len(predictions), -1, *[1] * (predictions[0].ndim - 1))
    return (a * torch.stack(list(predictions))).sum(0)


def average_variance(step: FusionStep) -> Tensor:
    """Σ a_i v_i + (1 - Σ a_i) v_ref, one an image."""
    a = step.exponents.to(step.x_t).reshape(step.plan.base + 1, -1, *[1] * (step.x_t.ndim - 1))
    return sum((a[i] * step.variance(i) for i in step.used), torch.zeros(()).to(step.x_t))
