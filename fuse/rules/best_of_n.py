"""Blockwise best of N."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.fuse.diffusion.gaussian import Gaussian, Latents
from stepfuse.fuse.lora.mixture import Rows
from stepfuse.fuse.rules.base import FusionRule
from stepfuse.fuse.rules.checks import check_from_base
from stepfuse.fuse.rules.options import BestOfNOptions
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.run import Run, private_generator, uniform_numbers
from stepfuse.fuse.rules.step import FusionStep


@dataclass(frozen=True)
class CoDe(FusionRule, BestOfNOptions):
    """Blockwise best of N (CoDe, arXiv:2502.00968): the base unrolled N times through a block of B steps, the
    candidate kept whose predicted x_0 has the largest Σ w_i r_i / σ_i.

    N is `candidates`, of which 1 is the base; B is `block_size`, and the last block may be shorter. Cost: N forwards a
    step, one in the first; a reward of N candidates a block. Needs rewards.
    """

    name = "code"
    summary = "Samples several candidates of the base a few steps at a time, and keeps the one with the best reward."
    needs = "rewards"

    @property
    def latents_per_image(self) -> int:
        return self.candidates

    def prepare(self, plan: Plan) -> Plan:
        """Raises ValueError for a strength, which the choice does not have, and for a base without noise."""
        check_from_base(plan, self.name, "its candidates would be alike" if self.candidates > 1 else "")
        return plan

    def fuse(self, step: FusionStep) -> Gaussian:
        """p_ref(x_s | x_t): the choice is among its samples."""
        return step.gaussian(step.plan.base)

    def denoise(self, run: Run, x_T: Latents, generators: list[torch.Generator]) -> Latents:
        """Candidates branch at the first step of a block; the best at its end is kept.

        The candidates of a block share its first prediction, and the look-ahead at its end is the first prediction of
        the next.
        """
        count, steps, base = self.candidates, len(run.plan.steps), run.plan.base
        if count == 1:
            return super().denoise(run, x_T, generators)
        uniforms = uniform_numbers(run.plan, generators)
        images = torch.arange(len(x_T)).repeat_interleave(count)
        branches = [private_generator(first, i) if i else first for first in generators for i in range(count)]
        x, (prediction,) = x_T, run.step(0, x_T, uniforms).predict([base.network])
        for step_index in range(steps):
            if step_index % self.block_size == 0:  # one latent an image, its prediction known
                step = run.step(step_index, x.repeat_interleave(count, 0), uniforms, images=images)
                prediction = prediction.repeat_interleave(count, 0)
            else:
                step = run.step(step_index, x, uniforms, images=images)
                (prediction,) = step.predict([base.network])
            x = run.sample(step, step.transition(prediction, step.variance(base)), branches)
            if step_index + 1 == steps:
                x = x[self._best(run, step_index, x, images)]
            elif (step_index + 1) % self.block_size == 0:
                ahead = run.step(step_index + 1, x, uniforms, images=images)
                (prediction,) = ahead.predict([base.network])
                clean, _ = run.plan.path.clean_and_noise(x, prediction, ahead.t)
                best = self._best(run, step_index, clean, images)
                x, prediction = x[best], prediction[best]
        return x

    def _best(self, run: Run, step_index: int, clean: Latents, images: Rows) -> Tensor:
        """The row of each image's candidate with the largest Σ w_i r_i / σ_i; rewards of weight 0 are not computed."""
        weights = run.plan.weights[step_index][: len(run.rewards), images]
        total = torch.zeros(len(clean), dtype=torch.float64)
        for reward, scale, w in zip(run.rewards, run.scales, weights, strict=True):
            if bool(w.any()):
                total += w * reward(clean, images).detach().cpu().double() / scale
        best = total.reshape(-1, self.candidates).argmax(1)
        return to_device(best + torch.arange(len(best)) * self.candidates, clean.device)
