"""One optimiser step on the micro-batches of a step, and what is measured of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Generic

import torch
from accelerate.utils import gather_object
from torch import Tensor

from stepfuse.data.text_files import quoted
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.train.algorithm import Algorithm, Batch, S
from stepfuse.train.health import Health
from stepfuse.train.kl_by_step import VertexKL, kl_tag
from stepfuse.train.setup import ModelSetup


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
        count, device = len(setup.sampling.steps), setup.accelerator.device
        totals = torch.zeros(count, 4, device=device)  # by denoising step
        alone = VertexKL(count, [each.name for each in setup.settings.each], device)
        faults: list[str] = []
        faulty = False
        for index, (batch, steps) in enumerate(chunks):
            last = index + 1 == len(chunks)
            with engine.synchronised(last):
                with setup.accelerator.autocast():
                    gaussians = algorithm.gaussians(engine.wrapped, setup.sampling, steps, batch.conditioning)
                losses = []
                for (policy, reference), stored in zip(gaussians, steps, strict=True):
                    if replaces:
                        algorithm.update_log_probs(stored, policy)
                    values, kl, parts = self._loss(policy, reference, stored)
                    faults += compress(batch.prompts, (~torch.isfinite(values)).tolist())
                    totals[algorithm.step_index(stored)] += parts.to(totals)
                    alone.add(algorithm.step_index(stored), kl, algorithm.weights(stored))
                    losses.append(values.mean())
                if last:  # before the last backward, after which DeepSpeed cannot drop the step
                    faulty = self._not_finite("a loss that is not finite", step, faults)
                engine.backward(torch.stack(losses).sum() / items, last=last)
        norm = engine.clip()
        if norm is not None and not math.isfinite(norm) and not faulty and not engine.scaled:
            prompts = [prompt for batch in batches for prompt in batch.prompts]
            faulty = self._not_finite("a gradient that is not finite", step, prompts)
        if faulty:
            engine.drop()
        else:
            norm = engine.step(norm)
            if not math.isfinite(norm) and not engine.scaled:
                raise ValueError(f"step {step}: the gradient is not finite; training stopped, checkpoints are kept")
        by_step = setup.accelerator.reduce(totals, "sum").tolist()
        loss_sum, kl_sum, kept_sum, count = map(sum, zip(*by_step, strict=True))
        measured = {
            "loss": loss_sum / max(kept_sum, 1e-12),
            "gradient_norm": norm if norm is not None else math.nan,
            "learning_rate": engine.rate.get_last_lr()[0],
        }
        if any(algorithm.kept(stored) is not None for _, steps in chunks for stored in steps):
            measured["kept_pairs"] = kept_sum / count
        if algorithm.measures_kl:  # nats per image: the sum over all denoising steps that can be trained on
            measured["kl"] = kl_sum / count * len(setup.learnable)
            measured |= {kl_tag(k): kl / n for k, (_, kl, _, n) in enumerate(by_step) if n}
            measured |= alone.means(setup.accelerator, len(setup.learnable))
        return measured

    def _loss(self, policy: Gaussian, reference: Gaussian | None, stored: S) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and KL of each sample of one denoising step; and their means, the share kept, and 1."""
        values = self.algorithm.loss(policy, reference, stored)
        kl = torch.zeros_like(values) if reference is None else policy.kl(reference)
        weights = self.algorithm.weights(stored)
        if self.algorithm.adds_kl and weights is not None:
            values = values + self.algorithm.beta(weights).to(kl) * kl
        kept = self.algorithm.kept(stored)
        share = torch.ones(()) if kept is None else kept.float().mean()
        parts = (values.mean(), kl.mean(), share, torch.ones(()))
        return values, kl.detach(), torch.stack([part.detach().to(values) for part in parts])

    def _not_finite(self, what: str, step: int, prompts: list[str]) -> bool:
        """Report something that is not finite on any process, with the prompts of all; whether there was any."""
        accelerator = self.setup.accelerator
        count = torch.tensor(float(len(prompts)), device=accelerator.device)
        if not accelerator.reduce(count, "sum").item():
            return False
        all_prompts = gather_object(prompts)
        if self.setup.engine.deepspeed and self.health.skips:
            raise ValueError(
                f"step {step}: {what}, for {quoted(sorted(all_prompts))}; with DeepSpeed a step cannot be skipped"
            )
        self.health.not_finite(what, step, all_prompts)
        return True
