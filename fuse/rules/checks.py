"""What rules refuse before anything is sampled: strengths and weights that leave no density to sample."""

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.rules.plan import Plan


def check_strength(plan: Plan) -> None:
    """Check that the product's precision is positive at every step: it depends on variances alone.

    Raises:
        ValueError: naming the step, the weights and the largest valid strength.
    """
    images = plan.weights.shape[2]
    limits = torch.full((len(plan.steps), images), torch.inf, dtype=torch.float64)
    for k in range(len(plan.steps)):
        used = (plan.weights[k] != 0).any(1)
        r = torch.tensor(
            [plan.relative_variance(e, k) for e, is_used in zip(plan.adapters, used.tolist(), strict=True) if is_used],
            dtype=torch.float64,
        )
        reference = plan.relative_variance(plan.base, k)
        present = [*r.tolist(), reference] if plan.strength != 1 else r.tolist()
        if plan.strength == 0:
            present = [reference]
        if min(present) == 0 and max(present) > 0:
            raise ValueError(
                f"step {k + 1} of {len(plan.steps)} mixes deterministic and random schedules (relative variances "
                f"{[round(v, 4) for v in present]}); use eta 0 for all, the base included, or for none"
            )
        if max(present) > 0 and plan.strength != 0:
            limits[k] = largest_strength(plan.weights[k][used], r, reference or r.max().item())
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


def check_average_variance(plan: Plan) -> None:
    """Check that Σ a_i v_i stays in [0, sigma_s²] at every step.

    Raises:
        ValueError: naming the step and the weights.
    """
    like = torch.zeros(1, 1, dtype=torch.float64)
    for k, (t, s) in enumerate(plan.steps):
        r = torch.tensor([plan.relative_variance(expert, k) for expert in plan.experts], dtype=torch.float64)
        average = (plan.exponents[k] * r[:, None]).sum(0)
        share = plan.path.ancestral_variance(t, s, like).item()
        room = plan.path.at(s, like)[1].item() ** 2
        outside = (average < -1e-9) | (average * share > room * (1 + 1e-6))
        if bool(outside.any()):
            image = int(outside.nonzero()[0])
            raise ValueError(
                f"strength {plan.strength:g} with weights {plan.label(k, image)} averages the variances to "
                f"{average[image].item() * share:g} at step {k + 1} of {len(plan.steps)}, outside 0 to {room:g}; "
                "use a strength nearer 1, or the rule product"
            )


def check_probabilities(plan: Plan, rule: str) -> None:
    """Check that all exponents lie in [0, 1].

    Raises:
        ValueError: naming the weights, or the strength.
    """
    if not 0 <= plan.strength <= 1:
        raise ValueError(
            f"rule {rule} with strength {plan.strength:g}; it selects experts at random, so expected 0 to 1"
        )
    if bool((plan.weights < 0).any()):
        k, _, image = (int(i) for i in (plan.weights < 0).nonzero()[0])
        raise ValueError(f"rule {rule} with weights {plan.label(k, image)}; expected none below 0")


def check_no_strength(plan: Plan, rule: str) -> None:
    """Check that the strength is 1, for a rule that has none.

    Raises:
        ValueError: for another strength.
    """
    if plan.strength != 1:
        raise ValueError(
            f"rule {rule} with strength {plan.strength:g}: it starts from the base and has no strength; use strength 1"
        )


def check_random(plan: Plan, rule: str, why: str) -> None:
    """Check that the base draws noise at some step.

    Raises:
        ValueError: for a deterministic base.
    """
    if not any(plan.relative_variance(plan.base, k) for k in range(len(plan.steps))):
        raise ValueError(
            f"rule {rule} needs a base that draws noise: {why}; create the set with a --reference_eta above 0"
        )
