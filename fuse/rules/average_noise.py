"""Averages of predicted noises."""

import torch

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.base import FusionRule, average_variance
from stepfuse.fuse.rules.checks import check_average_variance
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.step import FusionStep


class AverageNoise(FusionRule):
    """e = Σ a_i e_i + (1 - Σ a_i) e_ref, predicted noises averaged (DB-MPA, Diffusion Blend, arXiv:2505.18547).

    Published for one variance schedule. Where the objectives' differ, the step's variance is their average,
    v = Σ a_i v_i + (1 - Σ a_i) v_ref; where they are equal this is `product`. Cost: as `product`. Needs no reward.
    """

    name = "average_noise"
    is_one_adapter = True

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength whose average variance leaves [0, sigma_s²]."""
        check_average_variance(plan)
        return plan

    def fuse(self, step: FusionStep) -> Gaussian:
        used = step.used
        predictions = torch.stack(step.predict_used(used))
        a = step.exponents(used).to(predictions).reshape(len(used), -1, *[1] * (step.x_t.ndim - 1))
        return step.transition((a * predictions).sum(0), average_variance(step))
