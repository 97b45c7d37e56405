"""The variance of a step as a fixed share of sigma_s²: coefficients-preserving sampling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from stepfuse.fuse.diffusion.gaussian import at_least_float32
from stepfuse.fuse.diffusion.noise_path import NoisePath, Time
from stepfuse.fuse.diffusion.variance import ScheduleOption, VarianceSchedule, check_number, correlation


@dataclass(frozen=True, kw_only=True)
class ShareSchedule(VarianceSchedule):
    """v = share · sigma_s², share in [0, 1]; coefficients-preserving sampling (CPS, arXiv:2509.05952).

        r = share / (1 - rho²),     rho = alpha_t sigma_s / (alpha_s sigma_t)     (`correlation`)

    CPS of noise level a has share = sin²(a π / 2): .794 at a = .7, .905 at .8; share 1 is diffusers'
    `stochastic_sampling`. The relative variance r is beyond 1 in short steps. At the end of a path whose sigma_s is 0,
    r = share and v = 0; a step between two equal noise levels has none either.

    It tends to no SDE, since every step, however short, draws the same share of the noise anew: errors do not vanish
    as steps become many. Of exactly denoised Gaussian data, 640 steps of shift 3 give samples whose standard deviation
    is .84 of the data's at a = .7; with `SDESchedule` it is .99.
    """

    options: ClassVar[Mapping[str, ScheduleOption]] = {
        "share": ScheduleOption(
            help="Variance as a share of sigma_s²; sin²(a π / 2) for CPS of noise level a.",
            valid=lambda share: 0 < share <= 1,
            expected="a number in (0, 1]: a deterministic step has no log-probability to train with",
        )
    }

    share: float

    def __post_init__(self) -> None:
        check_number("share", self.share, most=1)

    def relative(self, path: NoisePath, t: Time, s: Time, like: Tensor) -> Tensor:
        ancestral_share = 1 - correlation(path, t, s, like) ** 2
        r = torch.where(ancestral_share > 0, self.share / ancestral_share, self.share)
        return r.to(at_least_float32(like).dtype)
