"""What one step of a run offers to a fusion rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stepfuse.data.devices import on_host, to_device
from stepfuse.fuse.diffusion.gaussian import Gaussian, Latents, all_zero, at_least_float32, per_sample
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.diffusion.transition import transition
from stepfuse.fuse.lora.mixture import Network, Rows
from stepfuse.fuse.rules.plan import Expert, Plan

Score = Callable[[Latents, Rows], Float[Tensor, " rows"]]
# Predictions at (x_t, t), one a network. The indices say which image each row of x_t is of, and which rows each network
# is run on, None for all.
PredictFn = Callable[[Latents, Time, Sequence[Network], Rows, Sequence[Rows | None]], list[Latents]]


@dataclass(frozen=True, kw_only=True)
class FusionStep:
    """One denoising step as a rule sees it; a network runs only when the rule asks for it.

    Attributes:
        plan: The run this is a step of, for as many images as x_t has rows.
        step_index: k, from 0.
        uniforms: Each image's random numbers in [0, 1), the same at every step; as many as there are steps, or experts.
        images: Which images of the batch the rows of x_t are.
        rewards: A reward of x_0 latents for each objective, differentiable where the reward is; for rules that need
            them.
        memory: What the rule keeps from step to step of the run.
    """

    plan: Plan
    step_index: int
    x_t: Latents
    predict_fn: PredictFn
    uniforms: Float[Tensor, "batch draws"]
    images: Rows
    rewards: Sequence[Score] = ()
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def t(self) -> Time:
        return self.plan.steps[self.step_index][0]

    @property
    def s(self) -> Time:
        return self.plan.steps[self.step_index][1]

    @property
    def used(self) -> list[Expert]:
        """The experts that take part in this step, whose exponent is not 0 for every image."""
        return [expert for expert, a in zip(self.plan.experts, self.exponents(), strict=True) if bool(a.any())]

    def exponents(self, experts: Sequence[Expert] | None = None) -> Float[Tensor, "experts batch"]:
        """a_i of experts at this step; by default of all, in the order of `plan.experts`."""
        all_experts = self.plan.exponents[self.step_index]
        return all_experts if experts is None else all_experts[[self.plan.experts.index(e) for e in experts]]

    def device_exponents(self, experts: Sequence[Expert]) -> Float[Tensor, "experts batch"]:
        """a_i of experts at this step, on the device of x_t."""
        table = self.plan.exponents_on(self.x_t.device, self._dtype)[self.step_index]
        return torch.stack([table[self.plan.experts.index(expert)] for expert in experts])

    def weight(self, expert: Expert) -> Float[Tensor, " batch"]:
        """w_i of an objective or oracle at this step."""
        return self.plan.weights[self.step_index, self.plan.adapters.index(expert)]

    def relative_variances(self, experts: Sequence[Expert]) -> Float[Tensor, " experts"]:
        """r of experts at this step: their variances in units of the ancestral one."""
        return self.plan.relative_variances(experts, self.step_index)

    def variance(self, expert: Expert) -> Tensor:
        """v of an expert at this step, in squared latent units, broadcastable against x_t."""
        if self.plan.has_table:
            of_steps = self.plan.variances(expert, self.x_t.device, self._dtype)
            return per_sample(of_steps[self.step_index], self.x_t)
        if expert not in self._variances:
            relative = expert.schedule.relative(self.plan.path, self.t, self.s, self.x_t)
            self._variances[expert] = relative * self._ancestral
        return self._variances[expert]

    @cached_property
    def _variances(self) -> dict[Expert, Tensor]:
        return {}

    @cached_property
    def _ancestral(self) -> Tensor:
        return self.plan.path.ancestral_variance(self.t, self.s, self.x_t)

    def is_deterministic(self, experts: Sequence[Expert]) -> bool | None:
        """Whether all of these experts' variances are 0 at this step, or none is; a ValueError for some.

        None where the variances themselves tell, on the host.
        """
        if not self.plan.has_table:
            return None if on_host(self.x_t) else False
        return all_zero(self._host_variances(experts))

    def _host_variances(self, experts: Sequence[Expert]) -> Float[Tensor, " experts"]:
        return torch.stack([self.plan.variances(each, "cpu", self._dtype)[self.step_index] for each in experts])

    @property
    def _dtype(self) -> torch.dtype:
        return at_least_float32(self.x_t).dtype

    def predict(self, networks: Sequence[Network], rows: Sequence[Rows] | None = None) -> list[Latents]:
        """Predictions at (x_t, t), each as large as x_t; with `rows` for these rows of x_t, and 0 elsewhere."""
        if rows is None:
            return self.predict_fn(self.x_t, self.t, networks, self.images, [None] * len(networks))
        run = [i for i, wanted in enumerate(rows) if len(wanted)]
        some = [self.some_rows(rows[i]) for i in run]
        results = [torch.zeros_like(self.x_t)] * len(networks)
        predictions = self.predict_fn(self.x_t, self.t, [networks[i] for i in run], self.images, some)
        for i, wanted, prediction in zip(run, some, predictions, strict=True):
            results[i] = self.spread(prediction, wanted)
        return results

    def some_rows(self, rows: Rows) -> Rows | None:
        """Rows of x_t, None for all of them."""
        return None if len(rows) == len(self.x_t) else rows

    def spread(self, prediction: Tensor, rows: Rows | None) -> Latents:
        """A prediction for some rows, as large as x_t, and 0 on the others."""
        if rows is None:
            return prediction
        result = torch.zeros_like(self.x_t, dtype=prediction.dtype)
        result[to_device(rows, prediction.device)] = prediction
        return result

    def used_networks(self, experts: Sequence[Expert]) -> list[tuple[Network, Rows]]:
        """The networks of experts, each for the images whose exponent is not 0."""
        rows = [a.nonzero().flatten() for a in self.exponents(experts)]
        return [(expert.network, some) for expert, some in zip(experts, rows, strict=True)]

    def soups(
        self,
        weights: Float[Tensor, "adapters images"],
        merge: Literal["weights", "factors"] = "weights",
        *,
        cacheable: bool = False,
    ) -> list[tuple[Network, Rows]]:
        """The adapters merged with these weights of each image: a network for each distinct mixture, with its images.

        Args:
            merge, cacheable: see `Network`.
        """
        mixtures, which = torch.unique(weights, dim=1, return_inverse=True)
        names = [adapter.name for adapter in self.plan.adapters]
        networks = [
            Network.merged(dict(zip(names, mixture, strict=True)), merge, cacheable=cacheable)
            for mixture in mixtures.T.tolist()
        ]
        return [(network, (which == i).nonzero().flatten()) for i, network in enumerate(networks)]

    def weighted(self, values: Sequence[Tensor]) -> Tensor:
        """Σ a_i x_i + (1 - Σ a_i) x_ref of values of the experts that `used` lists."""
        exponents = self.device_exponents(self.used)
        return reduce(torch.add, [per_sample(a, x) * x for a, x in zip(exponents, values, strict=True)])

    def transition(self, prediction: Latents, variance: Tensor) -> Gaussian:
        """p(x_s | x_t) of a prediction for all rows."""
        return transition(self.plan.path, self.x_t, prediction, self.t, self.s, variance)

    def gaussian(self, expert: Expert) -> Gaussian:
        """p_i(x_s | x_t) of one expert, for every image: one forward."""
        (prediction,) = self.predict([expert.network])
        return self.transition(prediction, self.variance(expert))

    def select_expert(self, choice: Int[Tensor, " batch"]) -> Gaussian:
        """p_i(x_s | x_t) of one expert an image, by its index in `plan.experts`: the forwards of one model."""
        variances = self._host_variances(self.plan.experts)[choice]
        variance = per_sample(to_device(variances, self.x_t.device), self.x_t)
        indices = choice.unique().tolist()
        experts, rows = [self.plan.experts[i] for i in indices], [(choice == i).nonzero().flatten() for i in indices]
        predictions = self.predict([expert.network for expert in experts], rows)
        return self.transition(reduce(torch.add, predictions), variance)
