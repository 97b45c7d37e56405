"""Isotropic Gaussians and the weighted product of their densities."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import on_host, to_device

Generators = torch.Generator | list[torch.Generator] | None
Latents = Float[Tensor, "batch *shape"]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """N(mean, variance · I), one a sample, in float32 or wider, in latent units.

    The variance broadcasts against the mean; of a denoising step it is one number a sample, 0 for a deterministic one.
    """

    mean: Latents
    variance: Float[Tensor, "#batch *#shape"]

    def __post_init__(self) -> None:
        for name in ("mean", "variance"):
            object.__setattr__(self, name, at_least_float32(getattr(self, name)))
        if self.variance.ndim != self.mean.ndim:
            raise ValueError(
                f"variance has {self.variance.ndim} dimensions and mean {self.mean.ndim}: "
                "give the variance one entry a sample and trailing dimensions of size 1"
            )

    def sample(self, generator: Generators = None) -> Latents:
        """x = m + sqrt(v) n, n ~ N(0, I); one generator a sample makes a draw independent of its batch."""
        noise = standard_normal(self.mean.shape, generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + root(self.variance) * noise

    def log_prob(self, x: Latents) -> Float[Tensor, " batch"]:
        """log p(x) = -|x - m|² / (2v) - (D/2) log(2πv), in nats: the sum over all D dimensions, never their mean.

        A ValueError where a variance is 0, for there is no density then; on a GPU, where reading it would make the host
        wait, NaN or infinite.
        """
        self._require_density("log_prob")
        log_two_pi_v = (2 * torch.pi * self.variance).log()
        terms = -0.5 * ((at_least_float32(x) - self.mean) ** 2 / self.variance + log_two_pi_v)
        return terms.reshape(len(terms), -1).sum(1)

    def kl(self, other: "Gaussian") -> Float[Tensor, " batch"]:
        """KL(self ‖ other) = Σ_d [ (m - m')² / v' + v / v' - 1 - log(v / v') ] / 2, in nats.

        A ValueError where a variance of either is 0; on a GPU NaN or infinite.
        """
        self._require_density("kl")
        other._require_density("kl")
        ratio = self.variance / other.variance
        terms = 0.5 * ((self.mean - other.mean) ** 2 / other.variance + ratio - 1 - ratio.log())
        return terms.reshape(len(terms), -1).sum(1)

    def _require_density(self, what: str) -> None:
        if on_host(self.variance) and not bool((self.variance > 0).all()):
            raise ValueError(
                f"{what} of a Gaussian of variance {self.variance.min().item():g}: a deterministic step "
                "(eta 0, or the last step of a scheduler that ends on alpha 1) has no density"
            )


def product(
    experts: Sequence[Gaussian],
    exponents: Float[Tensor, "experts"] | Float[Tensor, "experts batch"],
    *,
    relative_variances: Float[Tensor, "experts"] | None = None,
    deterministic: bool | None = None,
    in_order: bool = False,
) -> Gaussian:
    """The normalised weighted product of densities, p* ∝ Π p_i^(a_i) (MSDDA, arXiv:2604.14379).

        1/v* = Σ a_i / v_i,        m* = v* Σ a_i m_i / v_i

    Exact for any number of experts and for negative exponents, as long as 1/v* > 0. Where every
    variance is 0 it is the limit of v_i = r_i v for v → 0: a weighted mean by a_i / r_i.

    Args:
        experts: the Gaussians p_i, of one shape.
        exponents: a_i, one an expert, or one an expert and sample.
        relative_variances: r_i, needed where variances are 0 and differ in their limit; 1 if not given.
        deterministic: whether every variance is 0, or none; by default the variances are read, for which the host
            waits where they are on a GPU.
        in_order: see `total`.

    Raises:
        ValueError: for a precision that is not positive, where it is on the host; and for zero variances beside
            non-zero ones, if they are read.
    """
    if not experts:
        raise ValueError("product of no experts: give at least one Gaussian")
    means = [expert.mean for expert in experts]
    a = _columns(exponents, len(experts), means[0])
    variances = torch.stack(torch.broadcast_tensors(*[expert.variance for expert in experts]))
    if deterministic is None:
        deterministic = all_zero(variances)
    v = _limit(relative_variances, variances) if deterministic else variances
    precision = total(a / v, in_order=in_order)
    if on_host(precision) and not bool((precision > 0).all()):
        raise ValueError(
            f"the fused precision 1/v* is {precision.min().item():g} and must be positive: "
            f"exponents {_numbers(exponents)} extrapolate too far for these variances"
        )
    variance = 1 / precision
    mean = variance * sum(a[i] / v[i] * means[i] for i in range(len(experts)))
    return Gaussian(mean=mean, variance=torch.zeros_like(variance) if deterministic else variance)


def total(values: Float[Tensor, "terms ..."], *, in_order: bool) -> Float[Tensor, "..."]:
    """Σ_i x_i over the first dimension; `in_order` one after the other.

    The order in which torch adds five or more depends on the other dimensions, so that the last bits of an image would
    depend on its batch.
    """
    return reduce(torch.add, values.unbind(0)) if in_order else values.sum(0)


def all_zero(variances: Tensor) -> bool:
    """Whether all variances are 0, or none is; a ValueError for some."""
    zero = variances == 0
    if bool(zero.any()) and not bool(zero.all()):
        raise ValueError(
            "product of deterministic and random steps: some variances are 0 and some are not "
            f"(smallest {variances.min().item():g}, largest {variances.max().item():g}); "
            "use eta 0 for all objectives or for none"
        )
    return bool(zero.all())


def standard_normal(
    shape: Sequence[int], generator: Generators, *, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "..."]:
    """Numbers of N(0, 1), drawn where the generators are, one generator for all samples or one a sample.

    Those of generators on the CPU are the same on every device, and go to a GPU without a wait of the host.
    """
    first = generator[0] if isinstance(generator, list) else generator
    drawn_on = device if first is None or first.device.type != "cpu" else first.device
    noise = randn_tensor(tuple(shape), generator=generator, device=drawn_on, dtype=dtype)
    return to_device(noise, device)


def root(x: Tensor) -> Tensor:
    """sqrt(x), with gradient 0 where x ≤ 0 (autograd's own is inf · 0 = NaN there)."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values, one a sample or one for all, with the dimensions of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision → float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _limit(relative: Tensor | None, variances: Tensor) -> Tensor:
    """What stands for variances that vanish: relative ones; all 0 (plain DDIM everywhere) counts as all equal."""
    if relative is None or not (relative > 0).any():
        return torch.ones_like(variances)
    if not (relative > 0).all():
        raise ValueError(
            f"relative variances {_numbers(relative)} mix deterministic and random schedules; "
            "use eta 0 for all objectives or for none"
        )
    return per_sample(relative.to(variances), variances).expand_as(variances)


def _columns(exponents: Tensor, count: int, like: Tensor) -> Tensor:
    """Exponents as (experts, batch or 1, 1, …, 1)."""
    a = torch.as_tensor(exponents, dtype=like.dtype, device=like.device)
    columns = a[:, None] if a.ndim == 1 else a
    if columns.ndim != 2 or len(columns) != count or columns.shape[1] not in (1, len(like)):
        raise ValueError(
            f"exponents of shape {tuple(a.shape)} for {count} experts and a batch of {len(like)}: "
            f"expected ({count},) or ({count}, {len(like)})"
        )
    return columns.reshape(*columns.shape, *[1] * (like.ndim - 1))


def _numbers(values: Tensor) -> list:
    return [round(v, 4) for v in torch.as_tensor(values).flatten().tolist()]
