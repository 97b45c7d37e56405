"""One optimiser step on the micro-batches of a step, and what is measured of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from accelerate.utils import gather_object
from torch import Tensor

from stepfuse.data.devices import to_device
from stepfuse.data.stages import counted
from stepfuse.data.text_files import quoted
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.train.algorithm import Algorithm, Batch, S
from stepfuse.train.health import Health
from stepfuse.train.kl_by_step import kl_tag, vertex_means
from stepfuse.train.setup import ModelSetup
from stepfuse.train.step_measures import StepMeasures, StepReading


@dataclass(frozen=True, kw_only=True)
class Update(Generic[S]):
    """Takes optimiser steps.

    With `timesteps_per_forward` above 1, and with several objectives, a forward pass has other rows than in the
    rollout, whose log-probabilities are then not reproduced exactly: the first update on a rollout replaces them by its
    own.
    """

    setup: ModelSetup
    algorithm: Algorithm[S]
    health: Health

    def __call__(self, batches: Sequence[Batch[S]], step: int, *, first: bool = True) -> dict[str, float]:
        """One optimiser step on the mean loss over samples and denoising steps, the `first` or a later one on them.

        Raises:
            ValueError: for a loss or gradient that is not finite, unless it is to be skipped.
        """
        setup, engine, algorithm = self.setup, self.setup.engine, self.algorithm
        shared = setup.settings.timesteps_per_forward
        chunks = [
            (batch, batch.steps[index : index + shared])
            for batch in batches
            for index in range(0, len(batch.steps), shared)
        ]
        items = sum(len(steps) for _, steps in chunks)
        replaces = first and (shared > 1 or len(setup.settings.each) > 1)
        measures = StepMeasures(setup.accelerator, len(setup.sampling.steps), [e.name for e in setup.settings.each])
        for index, (batch, steps) in enumerate(counted(chunks, "loss and gradient")):
            last = index + 1 == len(chunks)
            with engine.synchronised(last):
                with setup.accelerator.autocast():
                    gaussians = algorithm.gaussians(engine.wrapped, setup.sampling, steps, batch.conditioning)
                losses = []
                for (policy, reference), stored in zip(gaussians, steps, strict=True):
                    if replaces:
                        algorithm.update_log_probs(stored, policy)
                    values, kl = self._loss(policy, reference, stored)
                    place = (algorithm.step_index(stored), algorithm.kept(stored), algorithm.weights(stored))
                    measures.add(batch.prompts, values.detach(), kl.detach(), *place)
                    losses.append(values.mean())
                if last and engine.deepspeed:  # after its last backward it cannot drop the step
                    self._has_faulty_loss(step, measures.read())
                engine.backward(torch.stack(losses).sum() / items, last=last)
        read = measures.read(engine.clip())
        norm = read.norm
        if self._has_faulty_loss(step, read) or self._has_faulty_gradient(step, read, batches):
            engine.drop()
        else:
            norm, applied = engine.step(norm)
            if applied and not math.isfinite(norm):  # of DeepSpeed, which has made the step
                raise ValueError(f"step {step}: the gradient is not finite; training stopped, checkpoints are kept")
        loss_sum, kl_sum, kept_sum, count = map(sum, zip(*read.by_step, strict=True))
        measured = {
            "loss": loss_sum / max(kept_sum, 1e-12),
            "gradient_norm": norm if norm is not None else math.nan,
            "learning_rate": engine.rate.get_last_lr()[0],
        }
        if any(algorithm.kept(stored) is not None for _, steps in chunks for stored in steps):
            measured["kept_pairs"] = kept_sum / count
        if algorithm.measures_kl:  # nats per image: the sum over all denoising steps that can be trained on
            measured["kl"] = kl_sum / count * len(setup.learnable)
            measured |= {kl_tag(k): kl / n for k, (_, kl, _, n) in enumerate(read.by_step) if n}
            measured |= vertex_means(read.vertices, len(setup.learnable))
        return measured

    def _loss(self, policy: Gaussian, reference: Gaussian | None, stored: S) -> tuple[Tensor, Tensor]:
        """Loss and KL of each sample of one denoising step."""
        values = self.algorithm.loss(policy, reference, stored)
        kl = torch.zeros_like(values) if reference is None else policy.kl(reference)
        weights = self.algorithm.weights(stored)
        if self.algorithm.adds_kl and weights is not None:
            values = values + to_device(self.algorithm.beta(weights), kl.device, kl.dtype) * kl
        return values, kl

    def _has_faulty_loss(self, step: int, read: StepReading) -> bool:
        if read.faults:
            self._report("a loss that is not finite", step, read.faulty)
        return read.faults > 0

    def _has_faulty_gradient(self, step: int, read: StepReading, batches: Sequence[Batch[S]]) -> bool:
        """Whether the gradient is not finite, on all processes alike. Where gradients are scaled that is no fault."""
        if read.norm is None or math.isfinite(read.norm):
            return False
        if not self.setup.engine.scaled:
            self._report("a gradient that is not finite", step, [p for batch in batches for p in batch.prompts])
        return True

    def _report(self, what: str, step: int, prompts: list[str]) -> None:
        """Report something that is not finite on any process, with the prompts of all."""
        all_prompts = gather_object(prompts)
        if self.setup.engine.deepspeed and self.health.skips:
            raise ValueError(
                f"step {step}: {what}, for {quoted(sorted(all_prompts))}; with DeepSpeed a step cannot be skipped"
            )
        self.health.not_finite(what, step, all_prompts)
