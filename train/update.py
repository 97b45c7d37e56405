"""One optimiser step on what was collected, with what was measured of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stepfuse.fuse.denoiser import Denoiser
from stepfuse.fuse.variance import VarianceSchedule
from stepfuse.train.algorithms import Algorithm
from stepfuse.train.collect import Batch
from stepfuse.train.engine import Engine
from stepfuse.train.health import Health, listed
from stepfuse.train.lora import step_gaussians


@dataclass(frozen=True, kw_only=True)
class Update:
    """Takes optimiser steps.

    Attributes:
        schedule: the initial one; learned offsets come from the policy.
        learnable: denoising steps of an image that can be learned from.
    """

    accelerator: Accelerator
    engine: Engine
    algorithm: Algorithm
    denoiser: Denoiser
    schedule: VarianceSchedule
    learnable: int
    health: Health

    def __call__(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """One optimiser step on the mean loss over samples and denoising steps."""
        engine, algorithm = self.engine, self.algorithm
        items = [(batch, stored) for batch in batches for stored in batch.trajectory.steps]
        totals = torch.zeros(4, device=self.accelerator.device)
        faults: list[str] = []
        faulty = False
        for number, (batch, stored) in enumerate(items):
            last = number + 1 == len(items)
            with engine.synchronised(last):
                with self.accelerator.autocast():
                    policy, reference = step_gaussians(
                        engine.wrapped, self.denoiser, self.schedule, stored, batch.trajectory.conditioning
                    )
                kl = torch.zeros(()) if reference is None else policy.kl(reference)
                values = algorithm.loss(policy, reference, stored)
                values = values + algorithm.beta * kl if algorithm.beta else values
                finite = torch.isfinite(values)
                if not bool(finite.all()):
                    faults += [prompt for prompt, good in zip(batch.prompts, finite.tolist(), strict=True) if not good]
                if last:  # before the last backward, which with DeepSpeed cannot be taken back
                    faulty = self._not_finite("a loss that is not finite", step, faults)
                engine.backward(values.mean() / len(items), last=last)
            kept = getattr(stored, "kept", None)
            share = torch.ones(()) if kept is None else kept.float().mean()
            totals += torch.stack(
                [part.detach().to(totals) for part in (values.mean(), kl.mean(), share, totals.new_ones(()))]
            )
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
            "kept_pairs": kept_sum / count,
            "gradient_norm": norm if norm is not None else math.nan,
            "learning_rate": engine.rate.get_last_lr()[0],
        }
        if algorithm.measures_kl:  # nats an image: the sum over all denoising steps that can be learned from
            measured["kl"] = kl_sum / count * self.learnable
        return measured

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
