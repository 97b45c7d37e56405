"""What a fusion rule is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from stepfuse.data.settings_fields import check_settings
from stepfuse.fuse.diffusion.gaussian import Gaussian, Latents
from stepfuse.fuse.lora.mixture import Network, Rows
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.run import Run, uniform_numbers
from stepfuse.fuse.rules.step import FusionStep


@dataclass(frozen=True)
class FusionRule:
    """How the experts of a step become the Gaussian that is sampled, and the loop around the steps.

    A subclass defines `fuse`; or `networks`, `combine` and `average`, so that adapters can also be trained through the
    rule. Its options are dataclass fields, declared with `setting`, by which they are checked. The attributes say what
    it needs of the sampler, which provides it before `prepare`, and what holds for its images; those that may depend on
    options are properties.

    Attributes:
        name: The rule's name in `RULES` and in messages; by default the name of the class.
        summary: What it does in a plain sentence or two, for those who choose among rules.
        needs: `"rewards"` while sampling, or their `"gradients"`.
        accepts: The weights it accepts: `"any"`, all on a `"single"` objective, those that adapters of the set were
            `"trained"` on, or `"none"`, because they have no effect.
        is_one_adapter: With all the weight on one adapter, at strength 1, its images are that adapter's, bit by bit.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    needs: ClassVar[Literal["", "rewards", "gradients"]] = ""
    accepts: ClassVar[Literal["any", "single", "trained", "none"]] = "any"
    is_one_adapter: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def merges(self) -> Literal["", "weights", "factors"]:
        """How it merges adapters, by weights, by factors, or not; the adapters must allow it."""
        return ""

    @property
    def uses_gaps(self) -> bool:
        """Whether it reads `Plan.gaps`, which the set's gap profile gives."""
        return False

    @property
    def latents_per_image(self) -> int:
        """How many latents of an image it denoises at once. Of several, a step's sample is not yet the image's."""
        return 1

    def prepare(self, plan: Plan) -> Plan:
        """Complete the plan of a run before anything is sampled, or raise a ValueError for what the rule cannot do."""
        return plan

    def fuse(self, step: FusionStep) -> Gaussian:
        """p(x_s | x_t) of one step."""
        networks, rows = zip(*self.networks(step), strict=True)
        return self.combine(step, step.predict(networks, rows))

    def networks(self, step: FusionStep) -> Sequence[tuple[Network, Rows]]:
        """The networks that a step needs predictions of, each with the rows of x_t that it is run on."""
        raise NotImplementedError

    def combine(self, step: FusionStep, predictions: Sequence[Latents]) -> Gaussian:
        """p(x_s | x_t) from the predictions of these networks, each as large as x_t, and 0 on other rows."""
        raise NotImplementedError

    def average(self, step: FusionStep, predictions: Sequence[Latents]) -> Latents:
        """One prediction in place of these, by which x_0 is estimated where images are scored within a trajectory."""
        raise NotImplementedError

    def denoise(self, run: Run, x_T: Latents, generators: list[torch.Generator]) -> Latents:
        """From x_T to x_0, step by step; an image depends on its generator alone."""
        x, uniforms = x_T, uniform_numbers(run.plan, generators)
        for step_index in range(len(run.plan.steps)):
            step = run.step(step_index, x, uniforms)
            gaussian = self.fuse(step)
            if not isinstance(gaussian, Gaussian):
                returned = type(gaussian).__name__
                raise ValueError(f"the rule {self.name!r} returned a {returned} for a step; expected a Gaussian")
            x = run.sample(step, gaussian, generators)
            if run.after:
                x, to_continue = run.after(step_index, step.t, x)
                if not to_continue:
                    break
        return x
