"""How images are sampled during training: the policies of the objectives, fused by a rule."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.plan import Expert, Plan
from stepfuse.fuse.rules.product import Product
from stepfuse.fuse.rules.step import FusionStep

Weights = Float[Tensor, "batch objectives"]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Predictions of the fused policy at (x_t, t).

    Attributes:
        predictions: guided ones of the networks that the rule asks for, each as large as x_t.
        negative: e_u of the base; None unless the guided predictions share it.
        reference: the guided prediction of the base, where it was asked for.
    """

    predictions: list[Latents]
    negative: Latents | None
    reference: Latents | None = None

    def __getitem__(self, rows: Tensor) -> "Fused":
        negative = None if self.negative is None else self.negative[rows]
        return Fused(predictions=[prediction[rows] for prediction in self.predictions], negative=negative)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled during training.

    Attributes:
        denoiser: the network and its guidance.
        objectives: the policies of the objectives, with their present variance schedules.
        rule: fuses them. With one objective every rule is that objective's policy.
        steps: pairs (t, s) of the noise path, noisiest first.
        shape: shape of one latent.
        learned: indices of the steps to train on; None is all of them.
    """

    denoiser: Denoiser
    objectives: tuple[Expert, ...]
    rule: FusionRule = field(default_factory=Product)
    steps: list[tuple[Time, Time]]
    shape: tuple[int, int, int]
    learned: frozenset[int] | None = None

    def trains_on(self, step: FusionStep) -> bool:
        """Whether a step is trained on: one without a variance is not, as the last of some schedulers."""
        wanted = self.learned is None or step.step_index in self.learned
        of_steps = [step.plan.variances(each, "cpu", torch.float32) for each in step.plan.objectives]
        return wanted and all(bool(v[step.step_index] > 0) for v in of_steps)

    def with_schedules(self, parameters: list[dict[str, Tensor]]) -> "Sampling":
        """The same with other values of the schedules' trainable fields, a mapping for each objective."""
        changed = [
            replace(each, schedule=each.schedule.with_parameters(values))
            for each, values in zip(self.objectives, parameters, strict=True)
        ]
        return replace(self, objectives=tuple(changed))

    def of_base(self) -> "Sampling":
        """The base model alone, with the schedule of the first objective."""
        return replace(self, objectives=(Expert.base(self.objectives[0].schedule),), rule=Product())

    def equal_weights(self, count: int) -> Weights:
        return torch.full((count, len(self.objectives)), 1 / len(self.objectives), dtype=torch.float64)

    def plan(self, weights: Weights, *, tabulated: bool = True) -> Plan:
        """The run of a batch of images with these weights, which sum to 1.

        Args:
            tabulated: see `Plan`; with schedules on the host.
        """
        table = weights.detach().double().cpu().T
        return Plan(
            path=self.denoiser.path,
            steps=self.steps,
            objectives=self.objectives,
            base=Expert.base(self.objectives[0].schedule.base),
            weights=table.expand(len(self.steps), *table.shape),
            strength=1.0,
            tabulated=tabulated,
        )

    def predict(
        self,
        step: FusionStep,
        conditioning: Conditioning,
        *,
        reference: bool = False,
        negative: Latents | None = None,
    ) -> Fused:
        """The predictions that the rule asks for at a step, and that of the base if it is wanted.

        Args:
            negative: of other predictions at this step.
        """
        networks, rows = zip(*self.rule.networks(step), strict=True)
        some = [step.some_rows(wanted) for wanted in rows]
        asked = ([*networks, BASE], [*some, None]) if reference else ([*networks], some)
        guided = self.denoiser.guided(step.x_t, step.t, conditioning, *asked, negative=negative)
        predictions = [step.spread(e, wanted) for e, wanted in zip(guided.predictions, some, strict=False)]
        base = guided.predictions[-1] if reference else None
        return Fused(predictions=predictions, negative=guided.negative, reference=base)

    def with_reference(self, step: FusionStep, conditioning: Conditioning, fused: Fused) -> Fused:
        """Earlier predictions at a step, and that of the base."""
        guided = self.denoiser.guided(step.x_t, step.t, conditioning, [BASE], negative=fused.negative)
        return replace(fused, reference=guided.predictions[0])

    def reference(self, step: FusionStep, prediction: Latents) -> Gaussian:
        """p_ref: what the rule makes of the base in place of every policy, with their schedules before training."""
        before = [replace(each, schedule=each.schedule.base) for each in step.plan.objectives]
        step = replace(step, plan=replace(step.plan, objectives=before, tabulated=False))
        rows = [step.some_rows(wanted) for _, wanted in self.rule.networks(step)]
        parts = [
            prediction if some is None else step.spread(prediction[to_device(some, prediction.device)], some)
            for some in rows
        ]
        return self.rule.combine(step, parts)


def fusion_step(plan: Plan, index: int, x_t: Latents) -> FusionStep:
    """A step of a plan as a rule sees it, without predictions of its own."""

    def none(*_: object) -> list[Latents]:
        raise ValueError("this rule predicts while it fuses, and cannot be trained through; use soup or product")

    uniforms = torch.zeros(len(x_t), 1, dtype=torch.float64)
    images = torch.arange(len(x_t))
    return FusionStep(plan=plan, step_index=index, x_t=x_t, predict_fn=none, uniforms=uniforms, images=images)
