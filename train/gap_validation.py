"""How much of the gap between product and soup a distillation has left."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.sampling.measure_gaps import mixtures_of
from stepfuse.train.checkpoints import Progress
from stepfuse.train.distill_setup import DistillSetup
from stepfuse.train.distillation import product_at
from stepfuse.train.fused_sampling import Sampling, Weights, fusion_step
from stepfuse.train.rollout import start
from stepfuse.train.validation import gathered, shared_batches, validation_prompts


class GapValidator:
    """Measures KL( product of the teachers ‖ soup of the students ), as `stepfuse set profile` does.

    Along the product's own runs, which do not change while the soup is trained: the sum over the steps is the KL
    between whole runs, by the chain rule, and before training it is that of the set's own soup. It is measured at the
    mixtures of a profile, and at the vertices, where students are to stay their teachers.

    Attributes:
        prompts: of the images.
        mixtures: weights by objective.
    """

    def __init__(self, setup: DistillSetup, progress: Progress) -> None:
        self.setup, self.progress = setup, progress
        self.prompts = validation_prompts(setup.settings, setup.prompts)
        names = setup.adapter_set.names
        self.mixtures = mixtures_of(names, setup.adapter_set.default_weights)
        self.drawn_by = {"seed": setup.settings.seed}
        self.vertices = [{name: 1.0} for name in names]

    def record(self, moment: str) -> None:
        """Keep the gaps, `before` or `after` training."""
        if moment == "before":
            self.progress.validation_prompts, self.progress.validation_settings = self.prompts, self.drawn_by
        elif (self.prompts, self.drawn_by) != (self.progress.validation_prompts, self.progress.validation_settings):
            raise ValueError(
                "the gap before was measured with other validation prompts or another seed; resume with the same"
            )
        self.progress.validation[moment] = self._measured()

    def save(self) -> None:
        """Show and log how much of the gap is left."""
        measured, setup = self._measured(), self.setup
        values = share_left(self.progress.validation["before"], measured)
        if setup.accelerator.is_main_process:
            gap = describe_gap(self.progress.validation["before"], measured)
            print(f"step {self.progress.step}: gap between product and soup {gap}", flush=True)
        logged = {"gap": measured["gap"]} | ({} if values is None else {"share_left": values})
        setup.accelerator.log(logged, step=self.progress.step)

    def _measured(self) -> dict[str, Any]:
        """The gaps in nats, sums over the steps and means over the images."""
        points = [*self.mixtures, *self.vertices]
        found = [self._gap(point) for point in points]
        count = len(self.mixtures)
        return {
            "gap": sum(found[:count]) / count,
            "images": len(self.prompts),
            "mixtures": [
                {"weights": dict(point), "gap": gap} for point, gap in zip(self.mixtures, found[:count], strict=True)
            ],
            "vertices": dict(zip(self.setup.adapter_set.names, found[count:], strict=True)),
        }

    @torch.no_grad()
    def _gap(self, point: Mapping[str, float]) -> float:
        setup = self.setup
        share: list[list[Tensor]] = []
        row = torch.tensor([[point.get(name, 0.0) for name in setup.adapter_set.names]], dtype=torch.float64)
        for prompts, generators in shared_batches(setup, "validation", self.prompts):
            with setup.accelerator.autocast():
                conditioning, weights = setup.embed(prompts), row.expand(len(prompts), -1)
                share.append([gap_of_runs(setup.sampling, setup.teachers, conditioning, generators, weights)])
        (gaps,) = gathered(setup.accelerator, share, len(self.prompts))
        gap = gaps.double().mean().item()
        if not math.isfinite(gap):
            raise ValueError(f"the gap at {dict(point)} is {gap}; lower learning_rate, or resume from an earlier step")
        return max(0.0, gap)


def gap_of_runs(
    students: Sampling,
    teachers: Sampling,
    conditioning: Conditioning,
    generators: list[torch.Generator],
    weights: Weights,
) -> Float[Tensor, " batch"]:
    """Σ_t KL( p*(x_s | x_t) ‖ p_θ(x_s | x_t) ) in nats, along the product's runs, over the steps that have noise."""
    x_t, plan, taught = start(students, generators), students.plan(weights), teachers.plan(weights)
    gaps = x_t.new_zeros(len(x_t))
    for index in range(len(students.steps)):
        step = fusion_step(plan, index, x_t)
        fused = students.predict(step, conditioning)
        product = product_at(teachers, replace(step, plan=taught), conditioning, fused)
        if students.trains_on(step):
            gaps += product.kl(students.rule.combine(step, fused.predictions))
        x_t = product.sample(generators)
    return gaps


def share_left(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """The share of a gap that is left; None if there was none."""
    return after["gap"] / before["gap"] if before["gap"] > 0 else None


def describe_gap(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A gap before and after training, and the share of it that is left."""
    share = share_left(before, after)
    left = "" if share is None else f", {100 * share:.3g} % is left"
    return f"{before['gap']:.4g} → {after['gap']:.4g} nats{left}"


def describe_validation(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The gaps of all mixtures together, of each, and at the vertices, a line each."""
    drift = ", ".join(f"{name} {nats:.4g}" for name, nats in after["vertices"].items())
    lines = [f"KL( product ‖ soup ) on {after['images']} images, mean of the mixtures: {describe_gap(before, after)}"]
    for one, other in zip(before["mixtures"], after["mixtures"], strict=True):
        mixture = " + ".join(f"{weight:.3g} {name}" for name, weight in one["weights"].items())
        lines.append(f"  {mixture}: {describe_gap(one, other)}")
    return [*lines, f"  one adapter alone, from its teacher: {drift} nats"]


def distilled_record(setup: DistillSetup, progress: Progress) -> dict[str, Any]:
    """What was distilled, and the gaps before and after."""
    before, after = progress.validation["before"], progress.validation["after"]
    return {
        "objectives": setup.adapter_set.names,
        "set": setup.settings.adapter_set,
        "rule": setup.teachers.rule.name,
        **_shares(before, after),
        "images": after["images"],
        "mixtures": [
            {"weights": one["weights"]} | _shares(one, other)
            for one, other in zip(before["mixtures"], after["mixtures"], strict=True)
        ],
        "vertices": after["vertices"],
    }


def _shares(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {"gap_before": before["gap"], "gap_after": after["gap"], "share_left": share_left(before, after)}
