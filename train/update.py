"""One optimiser step on what was collected, with what was measured of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.train.algorithms import Algorithm
from stepfuse.train.collect import Batch
from stepfuse.train.engine import Engine
from stepfuse.train.health import Health, listed
from stepfuse.train.lora import step_gaussians
from stepfuse.train.rollout import NoisedPairs, PairedStep, SampledStep, Step


@dataclass(frozen=True, kw_only=True)
class Update:
    """Takes optimiser steps.

    Attributes:
        schedule: the initial one; learned offsets come from the policy.
        learnable: denoising steps of an image that can be learned from.
        together: how many of a batch's denoising steps go through one forward. If several, the rollout's forwards had
            other rows, so its log-probs are not met again to the last bit: the first update takes its own for them.
    """

    accelerator: Accelerator
    engine: Engine
    algorithm: Algorithm
    denoiser: Denoiser
    schedule: VarianceSchedule
    learnable: int
    health: Health
    together: int = 1

    def __call__(self, batches: Sequence[Batch], step: int, *, first: bool = True) -> dict[str, float]:
        """One optimiser step on the mean loss over samples and denoising steps.

        Args:
            first: of those on this rollout.
        """
        engine = self.engine
        chunks = [
            (batch, batch.trajectory.steps[place : place + self.together])
            for batch in batches
            for place in range(0, len(batch.trajectory.steps), self.together)
        ]
        items = sum(len(steps) for _, steps in chunks)
        totals = torch.zeros(4, device=self.accelerator.device)
        faults: list[str] = []
        faulty = False
        for number, (batch, steps) in enumerate(chunks):
            last = number + 1 == len(chunks)
            with engine.synchronised(last):
                losses = []
                for (policy, reference), stored in zip(self._gaussians(batch, steps), steps, strict=True):
                    if first and self.together > 1 and isinstance(stored, SampledStep):
                        stored.log_prob.copy_(policy.log_prob(stored.x_s).detach())
                    values, parts = self._loss(policy, reference, stored)
                    good = torch.isfinite(values).tolist()
                    faults += [prompt for prompt, fine in zip(batch.prompts, good, strict=True) if not fine]
                    totals += parts.to(totals)
                    losses.append(values.mean())
                if last:  # before the last backward, which with DeepSpeed cannot be taken back
                    faulty = self._not_finite("a loss that is not finite", step, faults)
                engine.backward(torch.stack(losses).sum() / items, last=last)
        norm = engine.clip()
        if norm is not None and not math.isfinite(norm) and not faulty and not engine.scaled:
            everyone = [prompt for batch in batches for prompt in batch.prompts]
            faulty = self._not_finite("a gradient that is not finite", step, everyone)
        if faulty:
            engine.drop()
        else:
            norm = engine.step(norm)
            if not math.isfinite(norm) and not engine.scaled:
                raise ValueError(f"step {step}: the gradient is not finite; training stopped, checkpoints are kept")
        loss_sum, kl_sum, kept_sum, count = self.accelerator.reduce(totals, "sum").tolist()
        measured = {
            "loss": loss_sum / max(kept_sum, 1e-12),
            "gradient_norm": norm if norm is not None else math.nan,
            "learning_rate": engine.rate.get_last_lr()[0],
        }
        if any(isinstance(stored, PairedStep) for _, steps in chunks for stored in steps):
            measured["kept_pairs"] = kept_sum / count
        if self.algorithm.measures_kl:  # nats an image: the sum over all denoising steps that can be learned from
            measured["kl"] = kl_sum / count * self.learnable
        return measured

    def _gaussians(
        self, batch: Batch, steps: Sequence[Step | NoisedPairs]
    ) -> Sequence[tuple[Gaussian, Gaussian | None]]:
        with self.accelerator.autocast():
            return step_gaussians(
                self.engine.wrapped, self.denoiser, self.schedule, steps, batch.trajectory.conditioning
            )

    def _loss(self, policy: Gaussian, reference: Gaussian | None, stored: Any) -> tuple[Tensor, Tensor]:
        """The loss of each sample of one denoising step; and its mean, that of the KL, the share kept, and 1."""
        kl = torch.zeros(()) if reference is None else policy.kl(reference)
        values = self.algorithm.loss(policy, reference, stored)
        values = values + self.algorithm.beta * kl if self.algorithm.beta else values
        kept = getattr(stored, "kept", None)
        share = torch.ones(()) if kept is None else kept.float().mean()
        parts = (values.mean(), kl.mean(), share, torch.ones(()))
        return values, torch.stack([part.detach().to(values) for part in parts])

    def _not_finite(self, what: str, step: int, own: list[str]) -> bool:
        """Whether any process has something that is not finite; told with the prompts of all."""
        count = torch.tensor(float(len(own)), device=self.accelerator.device)
        if not self.accelerator.reduce(count, "sum").item():
            return False
        everyone = gather_object(own)
        if self.engine.deepspeed and self.health.skips:
            raise ValueError(f"step {step}: {what}, for {listed(everyone)}; with DeepSpeed a step cannot be skipped")
        self.health.not_finite(what, step, everyone)
        return True
