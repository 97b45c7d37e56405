"""The training loop of RockeyCoss/SPO, restated: `train_spo.py` with its configuration of Stable Diffusion 1.5."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Latents
from stepfuse.fuse.backbones.unet import decode_latents
from stepfuse.scripts.baselines.training import Loop, PerSample, Task, ddim_step


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Steps and their best and worst candidate, a row each."""

    x_t: Latents
    winner: Latents
    loser: Latents
    times: Int[Tensor, " batch"]
    conditioning: Conditioning

    def __getitem__(self, rows: Tensor) -> "Pairs":
        return Pairs(
            x_t=self.x_t[rows],
            winner=self.winner[rows],
            loser=self.loser[rows],
            times=self.times[rows],
            conditioning=self.conditioning[rows],
        )


class SPO(Loop):
    """Step by step, the best of k candidates against the worst, with a second UNet for the reference.

    Its reward knows the time of a step and sees x_0 as predicted there; here it is the one that all share. It takes an
    optimiser step after every micro-batch; here one for all of them, as ours does.

    Args:
        candidates: k.
        skip_first_steps: steps before the first that branches.
        threshold: what the rewards of a pair must differ by.
    """

    def __init__(self, task: Task, *, candidates: int = 4, skip_first_steps: int = 4, threshold: float = 0.0) -> None:
        self.reference = copy.deepcopy(task.pipeline.unet)
        super().__init__(task)
        self.candidates, self.skip_first_steps, self.threshold = candidates, skip_first_steps, threshold

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.unet, self.reference)

    def accumulate(self) -> None:
        self.learn(self.rollout())

    @torch.no_grad()
    def rollout(self) -> Pairs:
        """After the first step that branches, all k candidates of an image go through the UNet, in 2 k rows."""
        self.unet.eval()
        prompts, conditioning, x = self.begin()
        images, k, dtype = len(x), self.candidates, x.dtype
        rows = torch.arange(images, device=self.device)
        wide = conditioning[rows.repeat(k)]
        found = []
        start, drawn, before = x, None, self.scheduler.timesteps[:1]
        for place, t in enumerate(self.scheduler.timesteps[:, None]):
            prediction = self.predict(self.unet, x, t, conditioning if drawn is None else wide)
            x_0, mean, deviation = ddim_step(self.scheduler, prediction, t, x)
            if drawn is None:
                start = x
            else:
                found.append((start, before.expand(images), *self._compare(drawn, x_0, prompts)))
                picks = torch.randint(k, (images,), device=self.device)
                start, mean = drawn[picks, rows], mean.unflatten(0, (k, images))[picks, rows]
            if place < self.skip_first_steps:
                x = (mean + deviation * torch.randn_like(mean)).to(dtype)
            else:
                drawn = (mean + deviation * torch.randn(k, *mean.shape, device=self.device)).to(dtype)
                x, before = drawn.flatten(0, 1), t
        assert drawn is not None
        found.append((start, before.expand(images), *self._compare(drawn, x, prompts)))
        x_t, times, winner, loser, kept = (torch.cat(parts) for parts in zip(*found, strict=True))
        everyone = conditioning[rows.repeat(len(found))]
        return Pairs(x_t=x_t, winner=winner, loser=loser, times=times, conditioning=everyone)[kept]

    def _compare(
        self, drawn: Float[Tensor, "candidates images channels height width"], clean: Latents, prompts: list[str]
    ) -> tuple[Latents, Latents, Bool[Tensor, " images"]]:
        """Winners and losers by the reward of their clean latents, and which pairs are kept."""
        rewards = self.task.reward(decode_latents(self.pipeline, clean), prompts * self.candidates)
        best, worst, kept = extremes(rewards.to(self.device).reshape(drawn.shape[:2]), self.threshold)
        rows = torch.arange(len(best), device=self.device)
        return drawn[best, rows], drawn[worst, rows], kept

    def learn(self, pairs: Pairs) -> None:
        """The gradient: four forwards of two rows a pair, though winner and loser start from one x_t."""
        if not len(pairs.times):
            raise ValueError("the candidates of every step have one reward; expected rewards that differ")
        self.unet.train()
        order = torch.randperm(len(pairs.times), device=self.device)
        batches = order.split(self.task.images)
        for batch in batches:
            part = pairs[batch]
            values = [
                self.log_prob(network, part.x_t, part.times, x_s, part.conditioning)
                for x_s in (part.winner, part.loser)
                for network in (self.trained, self.reference)
            ]
            self.task.accelerator.backward(spo_loss(*values) / len(batches))


def extremes(
    rewards: Float[Tensor, "candidates images"], threshold: float
) -> tuple[Int[Tensor, " images"], Int[Tensor, " images"], Bool[Tensor, " images"]]:
    """The places of the highest and the lowest reward of each image, and whether they differ by more."""
    (highest, best), (lowest, worst) = rewards.max(0), rewards.min(0)
    return best, worst, highest - lowest > threshold


def spo_loss(
    winner: PerSample,
    reference_winner: PerSample,
    loser: PerSample,
    reference_loser: PerSample,
    *,
    beta: float = 10.0,
    clip: float = 0.1,
) -> Tensor:
    """The mean of -log σ(β (log r_w - log r_l)), r = clamp(exp(log_prob - reference), 1 ± clip)."""
    first, second = (
        (log_prob - reference).exp().clamp(1 - clip, 1 + clip).log()
        for log_prob, reference in ((winner, reference_winner), (loser, reference_loser))
    )
    return -functional.logsigmoid(beta * (first - second)).mean()
