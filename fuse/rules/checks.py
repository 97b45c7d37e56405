"""What rules refuse before anything is sampled: strengths and weights that leave no density to sample."""

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.rules.plan import Plan


def check_strength(plan: Plan) -> None:
    """Check by the variances that each step's precision is positive; a ValueError has the largest valid strength."""
    images = plan.weights.shape[2]
    limits = torch.full((len(plan.steps), images), torch.inf, dtype=torch.float64)
    for k in range(len(plan.steps)):
        r, used = plan.relative_variances(plan.experts, k), (plan.exponents[k] != 0).any(1)
        if r[used].min() == 0 and r[used].max() > 0:
            raise ValueError(
                f"step {k + 1} of {len(plan.steps)} mixes deterministic and random schedules (relative variances "
                f"{[round(v, 4) for v in r[used].tolist()]}); use eta 0 for all, the base included, or for none"
            )
        if r[used].max() > 0 and plan.strength != 0:
            adapters, reference = r[:-1][used[:-1]], r[-1].item()
            limits[k] = largest_strength(plan.weights[k][used[:-1]], adapters, reference or adapters.max().item())
    if bool((limits <= plan.strength).any()):
        k, image = divmod(int(limits.argmin()), images)
        raise ValueError(
            f"strength {plan.strength:g} with weights {plan.label(k, image)} leaves no positive precision at step "
            f"{k + 1} of {len(plan.steps)}; the largest valid strength is just below {limits.min().item():.4g}"
        )


def largest_strength(
    weights: Float[Tensor, "objectives batch"],
    relative_variances: Float[Tensor, " objectives"],
    reference: float,
) -> Float[Tensor, " batch"]:
    """The supremum of λ for which the product's precision is positive at one step, one a sample.

    The precision is (1 - λ) / r_ref + λ Σ w_i / r_i in units of the ancestral variance, linear in λ.
    Infinite where every λ ≥ 0 is valid.
    """
    slope = (weights / relative_variances[:, None]).sum(0) - 1 / reference
    limit = -1 / (reference * slope)
    return torch.where(slope < 0, limit, torch.inf)


def check_from_base(plan: Plan, rule: str, noise_for: str = "") -> None:
    """Raise a ValueError for a strength other than 1, and, if a rule needs noise for something, for a base without."""
    if plan.strength != 1:
        raise ValueError(
            f"rule {rule} with strength {plan.strength:g}: it starts from the base and has no strength; use strength 1"
        )
    if noise_for and not any(plan.relative_variances([plan.base], k).item() for k in range(len(plan.steps))):
        raise ValueError(
            f"rule {rule} needs a base policy that adds noise: {noise_for}; create the set with a "
            "--reference_eta above 0"
        )
