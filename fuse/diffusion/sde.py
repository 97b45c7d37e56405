"""The exact step of the SDE that samplers of flow matching discretise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import at_least_float32
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.diffusion.variance import ScheduleOption, VarianceSchedule, check_number, correlation


@dataclass(frozen=True, kw_only=True)
class SDESchedule(VarianceSchedule):
    """v = sigma_s² (1 - rho^(a²)), rho = alpha_t sigma_s / (alpha_s sigma_t): the exact step of an SDE.

    The SDE has the marginals of the path and the diffusion coefficient g² dt = a² sigma_t² d log(sigma_t / alpha_t), on
    a flow path g = a sqrt(t / (1 - t)) (Flow-GRPO, arXiv:2505.05470); x_0 is the predicted one throughout a step,
    for which the SDE is linear and its transition a Gaussian:

        x_s = alpha_s x_0 + sigma_s rho^(a² / 2) e + sqrt(v) n,     r = (1 - rho^(a²)) / (1 - rho²)

    a = sqrt(2) is eta 1 for any number of steps, and a = 0 the deterministic step. To leading order in the length of a
    step r = a² / 2, so that eta = a / sqrt(2). At t = 1 of a flow path, where g is infinite, rho is 0 and v = sigma_s²
    for every a above 0. Flow-GRPO itself takes an Euler-Maruyama step, whose variance exceeds sigma_s² near the end,
    and which is no step of this family.
    """

    options: ClassVar[Mapping[str, ScheduleOption]] = {
        "noise_level": ScheduleOption(
            help="The noise level a of the SDE; 1.414 is ancestral sampling, .7 is usual.",
            valid=lambda a: 0 < a < float("inf"),
            expected="a positive number: a deterministic step has no log-probability to train with",
        )
    }

    noise_level: float

    def __post_init__(self) -> None:
        check_number("noise_level", self.noise_level)

    def relative(self, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
        rho, power = correlation(path, t, s, like), self.noise_level**2
        r = torch.where(rho < 1, (1 - rho**power) / (1 - rho**2), power / 2)
        return r.to(at_least_float32(like).dtype)
