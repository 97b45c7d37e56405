"""What a run of the sampler is asked for: its steps, its experts, and how much of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.fuse.lora.mixture import BASE, Network, Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Expert:
    """One of the policies that are fused: the base, or the adapter of an objective or oracle, which names it."""

    name: str
    schedule: VarianceSchedule
    network: Network

    @classmethod
    def adapter(cls, name: str, schedule: VarianceSchedule) -> "Expert":
        return cls(name=name, schedule=schedule, network=Network.of(name))

    @classmethod
    def base(cls, schedule: VarianceSchedule) -> "Expert":
        """The reference policy, p_ref."""
        return cls(name="base", schedule=schedule, network=BASE)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run: its steps, the experts that may be fused, and how much of each is wanted.

    Attributes:
        steps: (t, s) of each denoising step.
        objectives: The experts that users give weights to.
        base: The expert of p_ref.
        oracles: Experts trained on weighted rewards, to compare fusion with.
        oracle_weights: The weights each oracle was trained on.
        weights: w_i of objectives and then oracles, summing to 1 at each step and for each image; 0 for oracles.
        strength: λ.
        guidance_interval: (begin, end) as shares of the steps, outside of which there is no guidance.
        gaps: KL( product ‖ soup ) of each step and image in nats, from the set's gap profile, for rules that use it.
        tabulated: Whether variances are computed once, for all steps, from schedules that are on the host. False for
            stored steps of training, of which a plan has one, and which are random.
        batch_invariant: Whether an image is computed in the same way whatever others the batch holds: without the
            shortcut for a batch of one expert, which saves rounding.

    Raises:
        ValueError: For an interval that is empty or not within [0, 1].
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
    tabulated: bool = True
    batch_invariant: bool = False
    _variances: dict[Any, Tensor] = field(default_factory=dict, repr=False)  # not of images, so of parts of a plan too

    def __post_init__(self) -> None:
        begin, end = self.guidance_interval
        if not 0 <= begin < end <= 1:
            raise ValueError(f"guidance_interval {begin:g}-{end:g}; expected shares of the steps, such as 0.2-0.8")

    @cached_property
    def adapters(self) -> tuple[Expert, ...]:
        """Objectives and then oracles."""
        return (*self.objectives, *self.oracles)

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """Objectives, oracles and last the base."""
        return (*self.adapters, self.base)

    @cached_property
    def exponents(self) -> Float[Tensor, "steps experts batch"]:
        """a_i = λ w_i, and 1 - λ for the base, float64, in the order of `experts`."""
        base = torch.full_like(self.weights[:, :1], 1 - self.strength)
        return torch.cat([self.strength * self.weights, base], 1)

    @cached_property
    def has_table(self) -> bool:
        """Whether a step takes its variances from `variances`, which have no gradient; not if schedules have one."""
        parameters = [value for expert in self.experts for value in expert.schedule.trainable().values()]
        return self.tabulated and not any(value.requires_grad for value in parameters)

    @cached_property
    def _exponents(self) -> dict[Any, Tensor]:
        return {}

    def exponents_on(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "steps experts batch"]:
        """`exponents` on a device, where they stay for the run."""
        if (device, dtype) not in self._exponents:
            with torch.inference_mode(False):  # kept longer than the mode they are first asked for in
                self._exponents[device, dtype] = to_device(self.exponents, device, dtype)
        return self._exponents[device, dtype]

    def variances(self, expert: Expert, device: torch.device | str, dtype: torch.dtype) -> Float[Tensor, " steps"]:
        """v of an expert at each step, in squared latent units, on a device, where they stay for the run."""
        key = expert, torch.device(device), dtype
        if key not in self._variances:
            with torch.inference_mode(False), torch.no_grad():  # kept longer than the mode they are first asked for in
                here = self._steps_of(expert, dtype) if key[1].type == "cpu" else self.variances(expert, "cpu", dtype)
                self._variances[key] = to_device(here, device)
        return self._variances[key]

    def _steps_of(self, expert: Expert, dtype: torch.dtype) -> Float[Tensor, " steps"]:
        like, path = torch.zeros(1, 1, dtype=dtype), self.path
        steps = [(t, s, expert.schedule.relative(path, t, s, like)) for t, s in self.steps]
        return torch.cat([(r * path.ancestral_variance(t, s, like)).reshape(1) for t, s, r in steps])

    def check_variances(self) -> None:
        """Check before a run that no expert's variance is outside [0, sigma_s²]; a ValueError names expert and step."""
        largest = torch.cat([self.path.at(s, torch.zeros(1, dtype=torch.float64))[1] ** 2 for _, s in self.steps])
        for expert in self.experts:
            v = self.variances(expert, "cpu", torch.float64)
            outside = ~((v >= 0) & (v <= largest * (1 + 1e-6)))
            if bool(outside.any()):
                k = int(outside.nonzero()[0])
                raise ValueError(
                    f"the variance schedule of {expert.name!r} gives a step variance of {v[k].item():g} at step "
                    f"{k + 1} of {len(self.steps)}, where the path allows 0 to sigma_s² = {largest[k].item():g}"
                )

    def is_guided(self, step_index: int) -> bool:
        """Whether there is guidance at a step: where begin ≤ k / T < end."""
        begin, end = self.guidance_interval
        return begin <= step_index / len(self.steps) < end

    def __getitem__(self, images: slice | Rows) -> "Plan":
        """The plan of some of the images."""
        gaps = None if self.gaps is None else self.gaps[:, images]
        return replace(self, weights=self.weights[..., images], gaps=gaps)

    @property
    def names_with_weight(self) -> list[str]:
        """The names of the objectives and oracles that have a weight other than 0 at some step of some image."""
        weighed = self.weights.any(2).any(0).tolist()
        return [expert.name for expert, has_weight in zip(self.adapters, weighed, strict=True) if has_weight]

    def relative_variances(self, experts: Sequence[Expert], step_index: int) -> Float[Tensor, " experts"]:
        """r of experts at a step: their variances in units of the ancestral one."""
        (t, s), like = self.steps[step_index], torch.zeros(1, 1, dtype=torch.float64)
        values = [expert.schedule.relative(self.path, t, s, like).item() for expert in experts]
        return torch.tensor(values, dtype=torch.float64)

    def label(self, step_index: int, image: int) -> str:
        """The weights of one image at one step, for messages."""
        weights = self.weights[step_index, :, image].tolist()
        return ", ".join(f"{expert.name}={w:g}" for expert, w in zip(self.objectives, weights, strict=False))
