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
from stepfuse.fuse.lora.mixture import Merge
from stepfuse.fuse.rules.objective import Objective
from stepfuse.fuse.rules.weight_table import weight_table
from stepfuse.fuse.rules.weights import Weights, weight_rows

Latents = Float[Tensor, "batch *shape"]
Rows = Int[Tensor, " rows"]
Score = Callable[[Latents, Rows], Float[Tensor, " rows"]]


class Networks(Protocol):
    """One method: predictions at (x_t, t), one a network.

    Args:
        networks: the place of an expert in the plan, or a merge of several.
        rows: which images of the batch the rows of x_t belong to.
        where: the rows of x_t that each network is wanted for, all for None.
    """

    def __call__(
        self,
        x_t: Latents,
        t: Time,
        networks: Sequence[int | Merge],
        rows: Rows,
        where: Sequence[Rows | None],
    ) -> list[Latents]: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run: its steps, the experts that may be fused and how much of each is wanted.

    Attributes:
        path: the noise path.
        steps: (t, s) of each denoising step.
        names: the objectives; after them the oracles, if there are any.
        schedules: variance schedules, one a name, the base's last.
        weights: w_i, summing to 1 at each step and for each image; 0 for oracles.
        strength: λ.
        oracles: the weights each oracle was trained on, a row an oracle.
        guidance_interval: (begin, end) as shares of the steps, outside of which there is no guidance.
        gaps: KL( product ‖ soup ) of each step and image in nats, as the set's profile has it; for rules with a gate.
    """

    path: NoisePath
    steps: Sequence[tuple[Time, Time]]
    names: Sequence[str]
    schedules: Sequence[VarianceSchedule]
    weights: Float[Tensor, "steps experts batch"]
    strength: float
    oracles: Float[Tensor, "oracles objectives"] = field(default_factory=lambda: torch.zeros(0, 0))
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    gaps: Float[Tensor, "steps batch"] | None = None

    @property
    def base(self) -> int:
        """The place of the base among the experts: the last."""
        return len(self.names)

    @property
    def objectives(self) -> int:
        """How many of the names are objectives; oracles follow them."""
        return len(self.names) - len(self.oracles)

    @cached_property
    def exponents(self) -> Float[Tensor, "steps places batch"]:
        """a_i = λ w_i, and 1 - λ for the base, float64."""
        base = torch.full_like(self.weights[:, :1], 1 - self.strength)
        return torch.cat([self.strength * self.weights, base], 1)

    def __getitem__(self, rows: slice | Rows) -> "Plan":
        """The plan of some of the images."""
        gaps = None if self.gaps is None else self.gaps[:, rows]
        return replace(self, weights=self.weights[..., rows], gaps=gaps)

    def relative(self, place: int, number: int) -> float:
        """r of an expert at a step: its variance in units of the ancestral one."""
        t, s = self.steps[number]
        return self.schedules[place].relative(self.path, t, s, torch.zeros(1, 1, dtype=torch.float64)).item()

    def merge(self, weights: Sequence[float], *, factors: bool = False, lasting: bool = False) -> Merge:
        """One network of all names, by a weight each."""
        return Merge(tuple(zip(self.names, weights, strict=True)), factors, lasting)

    def label(self, number: int, image: int) -> str:
        """The weights of one image at one step, for messages."""
        shares = self.weights[number, :, image].tolist()
        objectives = [(name, w) for name, w in zip(self.names, shares, strict=True)][: self.objectives]
        return ", ".join(f"{name}={w:g}" for name, w in objectives)


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
    """The plan of a run for `count` images; what is wanted of it is explained at `FusedSampler.plan`.

    Raises:
        ValueError: for weights or a strength that make no plan.
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
        names=[expert.name for expert in (*objectives, *oracles)],
        schedules=[*(expert.variance for expert in (*objectives, *oracles)), reference],
        weights=torch.cat([table, torch.zeros(len(steps), len(oracles), count, dtype=torch.float64)], 1),
        strength=float(strength),
        oracles=weight_table(oracle_weights, names)[0].T if oracles else torch.zeros(0, 0),
        guidance_interval=guidance_interval,
    )


@dataclass(frozen=True, kw_only=True)
class FusionStep:
    """One denoising step as a rule sees it; a network runs only when the rule asks for it.

    Attributes:
        plan: the run this is a step of, for as many images as x_t has rows.
        number: k, from 0.
        x_t: the latents.
        networks: predictions of the plan's experts.
        uniforms: each image's own numbers in [0, 1), the same at every step; as many as there are steps, or experts.
        rewards: a reward of x_0 latents an objective, differentiable where the reward is; for rules that need them.
        rows: which images of the batch x_t's rows are; by default all, in order.
        memory: what a rule keeps from step to step of one run.
    """

    plan: Plan
    number: int
    x_t: Latents
    networks: Networks
    uniforms: Float[Tensor, "batch draws"]
    rewards: Sequence[Score] = ()
    rows: Rows | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def t(self) -> Time:
        return self.plan.steps[self.number][0]

    @property
    def s(self) -> Time:
        return self.plan.steps[self.number][1]

    @property
    def exponents(self) -> Float[Tensor, "places batch"]:
        """a_i of this step, the base's last."""
        return self.plan.exponents[self.number]

    @property
    def used(self) -> list[int]:
        """Places of the experts whose exponent is not 0 for every image."""
        return (self.exponents != 0).any(1).nonzero().flatten().tolist()

    def relative(self, places: Sequence[int]) -> Float[Tensor, " places"]:
        """r of experts at this step."""
        return torch.tensor([self.plan.relative(place, self.number) for place in places], dtype=torch.float64)

    def predict(self, networks: Sequence[int | Merge], where: Sequence[Rows | None] | None = None) -> list[Latents]:
        """Predictions at (x_t, t), each for some rows of x_t or for all."""
        images = torch.arange(len(self.x_t)) if self.rows is None else self.rows
        return self.networks(self.x_t, self.t, networks, images, where or [None] * len(networks))

    def predict_some(self, networks: Sequence[int | Merge], where: Sequence[Rows]) -> list[Latents]:
        """The same, each as large as x_t and 0 elsewhere."""
        wanted = [i for i, rows in enumerate(where) if len(rows)]
        everywhere = [None if len(where[i]) == len(self.x_t) else where[i] for i in wanted]
        results = [torch.zeros_like(self.x_t)] * len(networks)
        for i, rows, e in zip(wanted, everywhere, self.predict([networks[i] for i in wanted], everywhere), strict=True):
            if rows is not None:
                results[i] = torch.zeros_like(self.x_t, dtype=e.dtype)
                results[i][rows.to(e.device)] = e
            else:
                results[i] = e
        return results

    def predict_used(self, places: Sequence[int]) -> list[Latents]:
        """Predictions of experts, for the images whose exponent is not 0; 0 for the others."""
        return self.predict_some(places, [(self.exponents[place] != 0).nonzero().flatten() for place in places])

    def variance(self, place: int) -> Tensor:
        """v of an expert at this step, in squared latent units, broadcastable against x_t."""
        r = self.plan.schedules[place].relative(self.plan.path, self.t, self.s, self.x_t)
        return r * self._ancestral

    @cached_property
    def _ancestral(self) -> Tensor:
        return self.plan.path.ancestral_variance(self.t, self.s, self.x_t)

    def transition(self, prediction: Latents, variance: Tensor) -> Gaussian:
        """p(x_s | x_t) of a prediction for all rows."""
        return transition(self.plan.path, self.x_t, prediction, self.t, self.s, variance)

    def gaussians(self, places: Sequence[int]) -> list[Gaussian]:
        """p_i(x_s | x_t) of experts: one forward each. Where an image's exponent is 0 it is not of that expert."""
        predictions = self.predict_used(places)
        return [self.transition(e, self.variance(i)) for e, i in zip(predictions, places, strict=True)]

    def chosen(self, choice: Int[Tensor, " batch"]) -> Gaussian:
        """p_i(x_s | x_t) of one expert an image, by place: the forwards of one model."""
        variance = torch.zeros(len(self.x_t), *[1] * (self.x_t.ndim - 1)).to(self.x_t)
        places = choice.unique().tolist()
        where = [(choice == place).nonzero().flatten() for place in places]
        prediction = sum(self.predict_some(places, where), torch.zeros(()).to(self.x_t))
        for place, rows in zip(places, where, strict=True):
            variance[rows.to(self.x_t.device)] = self.variance(place).to(variance)
        return self.transition(prediction, variance)
