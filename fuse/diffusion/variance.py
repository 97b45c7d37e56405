"""Variance schedules: how random each objective's denoising steps are.

A schedule gives r, the variance of a step relative to the ancestral one (`NoisePath.ancestral_variance`):
v = r · ancestral. Its limit as variances vanish is then well defined, and one schedule serves any number of steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import on_host, to_device
from stepfuse.fuse.diffusion.gaussian import at_least_float32, per_sample
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time


@dataclass(frozen=True, kw_only=True)
class ScheduleOption:
    """An argument of a schedule in training: a number, or a list of numbers.

    Attributes:
        valid: whether a value can be trained with.
        expected: in words, which values can.
        setting: the training setting that it is; by default it is an entry of `variance_options`.
    """

    help: str = ""
    valid: Callable[[Any], bool] = lambda value: True
    expected: str = "another value"
    setting: str = ""


@dataclass(frozen=True, kw_only=True)
class VarianceSchedule(ABC):
    """A variance schedule: a frozen dataclass whose fields, which are stored, are numbers, tuples of them, or tensors.

    Attributes:
        options: the arguments of `initial` by name; by default the fields.
    """

    options: ClassVar[Mapping[str, ScheduleOption]] = {}

    @abstractmethod
    def relative(self, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
        """The relative variance r of the step from t to s, broadcastable against `like`."""

    @classmethod
    def initial(cls, **options: Any) -> "VarianceSchedule":
        """The schedule that training starts from."""
        return cls(**options)

    @property
    def base(self) -> "VarianceSchedule":
        """The schedule of the base model in training, which is this one before it was trained."""
        return self

    def trainable(self) -> dict[str, Tensor]:
        """The fields that are trained with the LoRA, by name."""
        return {}

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> "VarianceSchedule":
        """This schedule with other values of its trainable fields."""
        return replace(self, **parameters)

    @classmethod
    def field_names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: _plain(getattr(self, name)) for name in self.field_names()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "VarianceSchedule":
        """The inverse of `to_json`."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def step_variance(schedule: VarianceSchedule, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
    """v = r · ancestral variance, in squared latent units, broadcastable against `like`."""
    return schedule.relative(path, t, s, like) * path.ancestral_variance(t, s, like)


def correlation(path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
    """rho = alpha_t sigma_s / (alpha_s sigma_t), in float64, broadcastable against `like`.

    It is the correlation of x_t and x_s given x_0 in the forward process, and rho² the ratio of their signal-to-noise
    ratios. The ancestral variance is sigma_s² (1 - rho²).
    """
    wide = like.new_zeros([1] * like.ndim, dtype=torch.float64)  # 1 - rho² cancels in short steps
    alpha_t, sigma_t = path.at(t, wide)
    alpha_s, sigma_s = path.at(s, wide)
    return alpha_t * sigma_s / (alpha_s * sigma_t)


TRAINED_ETA = ScheduleOption(
    help="DDIM's eta; 1 is ancestral sampling.",
    valid=lambda eta: 0 < eta <= 1,
    expected="a number in (0, 1]: a deterministic step has no log-probability to train with",
    setting="sample_eta",
)


@dataclass(frozen=True, kw_only=True)
class EtaSchedule(VarianceSchedule):
    """r = eta² (DDIM, arXiv:2010.02502, eq. 16), eta in [0, 1]: 0 is deterministic, 1 ancestral sampling."""

    options: ClassVar[Mapping[str, ScheduleOption]] = {"eta": TRAINED_ETA}

    eta: float = 1.0

    def __post_init__(self) -> None:
        check_number("eta", self.eta, most=1)

    def relative(self, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
        return like.new_full([1] * like.ndim, self.eta**2, dtype=at_least_float32(like).dtype)


@dataclass(frozen=True, kw_only=True)
class TableSchedule(VarianceSchedule):
    """r = eta_k², one eta in [0, 1] for each of equal intervals of the time, the noisiest first.

    With as many sampling steps as entries, each step has its own; with another number, a step takes the entry of the
    interval that it starts in.
    """

    options: ClassVar[Mapping[str, ScheduleOption]] = {
        "etas": ScheduleOption(
            help="One eta per step, noisiest step first.",
            valid=lambda etas: len(etas) > 0 and all(0 < eta <= 1 for eta in etas),
            expected="one number in (0, 1] per step: a deterministic step has no log-probability to train with",
            setting="sample_etas",
        )
    }

    etas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "etas", tuple(self.etas))
        if not self.etas:
            raise ValueError("an empty variance table; give one eta a step")
        for eta in self.etas:
            check_number("eta", eta, most=1)

    def relative(self, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
        row = (_starts(path, len(self.etas)) >= path.share(t)[:, None]).sum(1) - 1
        etas = torch.tensor(self.etas, dtype=torch.float64)[row.clamp(0, len(self.etas) - 1)]
        return to_device(per_sample(etas.square(), like), like.device, at_least_float32(like).dtype)


@dataclass(frozen=True, kw_only=True)
class LearnedSchedule(VarianceSchedule):
    """Log-variance offsets at knots over the time, which are trained with the LoRA.

        v = sigma_s² E p / (1 - p + E p),   E = exp(offset(t)),   p = eta² · ancestral / sigma_s²

    For v far below sigma_s² this is v = exp(offset) · eta² · ancestral; the logistic form keeps v under
    sigma_s², beyond which no transition exists. Offsets are linear between two or more knots, which are evenly spaced
    over [0, 1] of the training time; eta is in (0, 1].
    """

    options: ClassVar[Mapping[str, ScheduleOption]] = {
        "eta": TRAINED_ETA,
        "knots": ScheduleOption(
            help="Number of offsets, evenly spaced over time and interpolated linearly.",
            valid=lambda knots: knots >= 2,
            expected="2 or more",
            setting="variance_knots",
        ),
    }

    offsets: Float[Tensor, " knots"]
    eta: float = 1.0

    @classmethod
    def initial(cls, **options: Any) -> "LearnedSchedule":
        return cls(offsets=torch.zeros(options["knots"]), eta=options["eta"])

    @property
    def base(self) -> EtaSchedule:
        return EtaSchedule(eta=self.eta)

    def trainable(self) -> dict[str, Tensor]:
        return {"offsets": self.offsets}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LearnedSchedule":
        if "offsets" not in values:
            raise TypeError("it has no offsets; expected one number for each knot")
        return cls(**{**values, "offsets": torch.tensor(values["offsets"], dtype=torch.float32)})

    def __post_init__(self) -> None:
        check_number("eta", self.eta, most=1)
        offsets = torch.as_tensor(self.offsets)
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        object.__setattr__(self, "offsets", offsets)
        if offsets.ndim != 1 or len(offsets) < 2:
            raise ValueError(f"learned schedule with offsets of shape {tuple(offsets.shape)}; expected 2 knots or more")
        if on_host(offsets) and not bool(torch.isfinite(offsets.detach()).all()):
            raise ValueError(f"learned schedule with offsets {offsets.tolist()}; expected finite numbers")
        if self.eta == 0:
            raise ValueError("learned schedule on eta 0: there is no variance to scale; use an eta above 0")

    def relative(self, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
        dtype = at_least_float32(like).dtype
        like = like.new_zeros([1] * like.ndim, dtype=torch.float64)
        position = to_device(path.share(t) * (len(self.offsets) - 1), like.device, like.dtype)
        low = position.floor().clamp(max=len(self.offsets) - 2).long()
        fraction = position - low
        offsets = to_device(self.offsets, like.device, like.dtype)
        offset = offsets[low] * (1 - fraction) + offsets[low + 1] * fraction
        growth = per_sample(offset.exp(), like)
        p = self.eta**2 * (1 - correlation(path, t, s, like) ** 2)
        return (growth * self.eta**2 / (1 - p + growth * p)).to(dtype)


@lru_cache(maxsize=16)
def _starts(path: NoisePath, count: int) -> Float[Tensor, " steps"]:
    """Where the steps of a sampler begin, as shares of the path; the same for every expert and step of a run."""
    return torch.cat([path.share(t) for t, _ in path.steps(count)])


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def check_number(name: str, value: float, *, most: float = math.inf) -> None:
    """Raise ValueError for a value that is not a finite number in [0, most]."""
    if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= most:
        expected = "a finite number, 0 or more" if most == math.inf else f"a number in [0, {most:g}]"
        raise ValueError(f"{name} is {value!r}; expected {expected}")
