"""Averages of predicted noises."""

from dataclasses import dataclass

from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.rules.base import average, average_variance
from stepfuse.fuse.rules.checks import (
    check_average_variance,
)
from stepfuse.fuse.rules.plan import FusionStep, Plan


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
