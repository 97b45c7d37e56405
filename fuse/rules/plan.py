"""What a run of the sampler is asked for, and what one of its steps offers to a fusion rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.mixture import BASE, Network, Rows
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import Weights, weight_rows

Latents = Float[Tensor, "batch *shape"]
Score = Callable[[Latents, Rows], Float[Tensor, " rows"]]


class PredictFn(Protocol):
    """Predictions at (x_t, t), one a network.

    Args:
        images: Which images of the batch the rows of x_t belong to.
        rows: The rows of x_t that each network is run on, all for None.
    """

    def __call__(
        self, x_t: Latents, t: Time, networks: Sequence[Network], images: Rows, rows: Sequence[Rows | None]
    ) -> list[Latents]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Expert:
    """One of the policies that are fused: the base, or an adapter with its own variance schedule.

    Attributes:
        name: The objective's or the oracle's; `base` for the base.
        schedule: Its variance schedule.
        network: What predicts for it.
    """

    name: str
    schedule: VarianceSchedule
    network: Network

    @classmethod
    def adapter(cls, name: str, schedule: VarianceSchedule) -> "Expert":
        """The policy of one adapter, by its name."""
        return cls(name=name, schedule=schedule, network=Network.of(name))

    @classmethod
    def base(cls, schedule: VarianceSchedule) -> "Expert":
        """The reference policy, p_ref."""
        return cls(name="base", schedule=schedule, network=BASE)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run: its steps, the experts that may be fused, and how much of each is wanted.

    Attributes:
        path: The noise path.
        steps: (t, s) of each denoising step.
        objectives: The experts that users give weights to.
        base: The expert of p_ref.
        oracles: Experts trained on weighted rewards, to compare fusion with.
        oracle_weights: The weights each oracle was trained on.
        weights: w_i of objectives and then oracles, summing to 1 at each step and for each image; 0 for oracles.
        strength: λ.
        guidance_interval: (begin, end) as shares of the steps, outside of which there is no guidance.
        gaps: KL( product ‖ soup ) of each step and image in nats, from the set's gap profile, for rules that use it.
    """

    path: NoisePath
    steps: Sequence[tuple[Time, Time]]
    objectives: Sequence[Expert]
    base: Expert
    oracles: Sequence[Expert] = ()
    oracle_weights: Float[Tensor, "oracles objectives"] = field(default_factory=lambda: torch.zeros(0, 0))
    weights: Float[Tensor, "steps adapters batch"]
    strength: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    gaps: Float[Tensor, "steps batch"] | None = None

    @cached_property
    def adapters(self) -> tuple[Expert, ...]:
        """Objectives and then oracles: every expert but the base."""
        return (*self.objectives, *self.oracles)

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """Objectives, oracles and last the base, in the order of `exponents`."""
        return (*self.adapters, self.base)

    @cached_property
    def exponents(self) -> Float[Tensor, "steps experts batch"]:
        """a_i = λ w_i, and 1 - λ for the base, float64."""
        base = torch.full_like(self.weights[:, :1], 1 - self.strength)
        return torch.cat([self.strength * self.weights, base], 1)

    def __getitem__(self, images: slice | Rows) -> "Plan":
        """The plan of some of the images."""
        gaps = None if self.gaps is None else self.gaps[:, images]
        return replace(self, weights=self.weights[..., images], gaps=gaps)

    def used(self, experts: Sequence[Expert]) -> list[Expert]:
        """Those of some objectives and oracles that have a weight other than 0 at some step of some image."""
        return [e for e in experts if bool((self.weights[:, self.adapters.index(e)] != 0).any())]

    def relative_variance(self, expert: Expert, step_index: int) -> float:
        """r of an expert at a step: its variance in units of the ancestral one."""
        t, s = self.steps[step_index]
        return expert.schedule.relative(self.path, t, s, torch.zeros(1, 1, dtype=torch.float64)).item()

    def label(self, step_index: int, image: int) -> str:
        """The weights of one image at one step, for messages."""
        weights = self.weights[step_index, :, image].tolist()
        return ", ".join(f"{expert.name}={w:g}" for expert, w in zip(self.objectives, weights, strict=False))


def make_plan(
    weights: Weights | Sequence[Weights],
    count: int,
    *,
    path: NoisePath,
    num_inference_steps: int,
    objectives: Sequence[Objective],
    oracles: Sequence[Objective],
    oracle_weights: Sequence[Mapping[str, float]],
    reference: VarianceSchedule,
    strength: float,
    weights_on: str,
    guidance_interval: tuple[float, float],
) -> Plan:
    """The plan of a run for `count` images; `FusedSampler.plan` explains the arguments.

    Raises:
        ValueError: For invalid weights or an invalid strength.
    """
    names = [objective.name for objective in objectives]
    rows = weight_rows(weights, names)
    if len(rows) not in (1, count):
        raise ValueError(f"{len(rows)} sets of weights for {count} images; expected 1 or {count}")
    steps = path.steps(num_inference_steps)
    table = weight_table(rows, names, len(steps)).expand(-1, -1, count)
    if weights_on == "rewards":
        for objective in objectives:
            if objective.temperature == 0:
                raise ValueError(
                    f"weights_on rewards goes by every adapter's beta, and {objective.name!r} was trained with none; "
                    "weigh exponents"
                )
        table = table * torch.tensor([[o.temperature] for o in objectives], dtype=torch.float64)
        table = table / table.sum(1, keepdim=True)
    elif weights_on != "exponents":
        raise ValueError(f"weights_on {weights_on!r}; expected exponents or rewards")
    if not strength >= 0 or strength == float("inf"):
        raise ValueError(f"strength {strength}; expected a finite number, 0 or more")
    return Plan(
        path=path,
        steps=steps,
        objectives=[Expert.adapter(objective.name, objective.variance) for objective in objectives],
        base=Expert.base(reference),
        oracles=[Expert.adapter(oracle.name, oracle.variance) for oracle in oracles],
        oracle_weights=weight_table(oracle_weights, names)[0].T if oracles else torch.zeros(0, 0),
        weights=torch.cat([table, torch.zeros(len(steps), len(oracles), count, dtype=torch.float64)], 1),
        strength=float(strength),
        guidance_interval=guidance_interval,
    )


@dataclass(frozen=True, kw_only=True)
class FusionStep:
    """One denoising step as a rule sees it; a network runs only when the rule asks for it.

    Attributes:
        plan: The run this is a step of, for as many images as x_t has rows.
        step_index: k, from 0.
        x_t: The latents.
        predict_fn: Runs the networks.
        uniforms: Each image's random numbers in [0, 1), the same at every step; as many as there are steps, or experts.
        rewards: A reward of x_0 latents for each objective, differentiable where the reward is; for rules that need
            them.
        images: Which images of the batch the rows of x_t are; by default all, in order.
        memory: What a rule keeps from step to step of one run.
    """

    plan: Plan
    step_index: int
    x_t: Latents
    predict_fn: PredictFn
    uniforms: Float[Tensor, "batch draws"]
    rewards: Sequence[Score] = ()
    images: Rows | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def t(self) -> Time:
        return self.plan.steps[self.step_index][0]

    @property
    def s(self) -> Time:
        return self.plan.steps[self.step_index][1]

    @property
    def used(self) -> list[Expert]:
        """The experts whose exponent is not 0 for every image."""
        used = (self.exponents() != 0).any(1).tolist()
        return [expert for expert, is_used in zip(self.plan.experts, used, strict=True) if is_used]

    def exponents(self, experts: Sequence[Expert] | None = None) -> Float[Tensor, "experts batch"]:
        """a_i of experts at this step; by default of all, in the order of `plan.experts`."""
        all_experts = self.plan.exponents[self.step_index]
        return all_experts if experts is None else all_experts[[self.plan.experts.index(e) for e in experts]]

    def exponent(self, expert: Expert) -> Float[Tensor, " batch"]:
        """a_i of one expert."""
        return self.exponents()[self.plan.experts.index(expert)]

    def weight(self, expert: Expert) -> Float[Tensor, " batch"]:
        """w_i of an objective or oracle at this step."""
        return self.plan.weights[self.step_index, self.plan.adapters.index(expert)]

    def relative_variances(self, experts: Sequence[Expert]) -> Float[Tensor, " experts"]:
        """r of experts at this step: their variances in units of the ancestral one."""
        return torch.tensor([self.plan.relative_variance(e, self.step_index) for e in experts], dtype=torch.float64)

    def variance(self, expert: Expert) -> Tensor:
        """v of an expert at this step, in squared latent units, broadcastable against x_t."""
        return expert.schedule.relative(self.plan.path, self.t, self.s, self.x_t) * self._ancestral

    @cached_property
    def _ancestral(self) -> Tensor:
        return self.plan.path.ancestral_variance(self.t, self.s, self.x_t)

    def predict(self, networks: Sequence[Network], rows: Sequence[Rows] | None = None) -> list[Latents]:
        """Predictions at (x_t, t), each as large as x_t; with `rows` for these rows of x_t, and 0 elsewhere."""
        images = torch.arange(len(self.x_t)) if self.images is None else self.images
        if rows is None:
            return self.predict_fn(self.x_t, self.t, networks, images, [None] * len(networks))
        run = [i for i, wanted in enumerate(rows) if len(wanted)]
        some = [None if len(rows[i]) == len(self.x_t) else rows[i] for i in run]
        results = [torch.zeros_like(self.x_t)] * len(networks)
        predictions = self.predict_fn(self.x_t, self.t, [networks[i] for i in run], images, some)
        for i, wanted, prediction in zip(run, some, predictions, strict=True):
            results[i] = prediction
            if wanted is not None:
                results[i] = torch.zeros_like(self.x_t, dtype=prediction.dtype)
                results[i][wanted.to(prediction.device)] = prediction
        return results

    def predict_used(self, experts: Sequence[Expert]) -> list[Latents]:
        """Predictions of experts for the images whose exponent is not 0, one forward each; 0 for the others."""
        rows = [self.exponent(expert).nonzero().flatten() for expert in experts]
        return self.predict([expert.network for expert in experts], rows)

    def transition(self, prediction: Latents, variance: Tensor) -> Gaussian:
        """p(x_s | x_t) of a prediction for all rows."""
        return transition(self.plan.path, self.x_t, prediction, self.t, self.s, variance)

    def gaussian(self, expert: Expert) -> Gaussian:
        """p_i(x_s | x_t) of one expert, for every image: one forward."""
        (prediction,) = self.predict([expert.network])
        return self.transition(prediction, self.variance(expert))

    def select_expert(self, choice: Int[Tensor, " batch"]) -> Gaussian:
        """p_i(x_s | x_t) of one expert an image, by its index in `plan.experts`: the forwards of one model."""
        variance = torch.zeros(len(self.x_t), *[1] * (self.x_t.ndim - 1)).to(self.x_t)
        experts = [self.plan.experts[index] for index in choice.unique().tolist()]
        rows = [(choice == self.plan.experts.index(expert)).nonzero().flatten() for expert in experts]
        predictions = self.predict([expert.network for expert in experts], rows)
        for expert, chosen in zip(experts, rows, strict=True):
            variance[chosen.to(self.x_t.device)] = self.variance(expert).to(variance)
        return self.transition(sum(predictions, torch.zeros(()).to(self.x_t)), variance)
