"""The training loop of RockeyCoss/SPO, restated: `train_spo.py` with its configuration of Stable Diffusion 1.5."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.scripts.baselines.training import Loop, PerSample, Task, ddim_step


@dataclass(frozen=True, kw_only=True)
class Pairs:
    x_t: Latents
    winner: Latents
    loser: Latents
    times: Int[Tensor, " batch"]
    conditioning: Conditioning

    def __getitem__(self, rows: Tensor) -> "Pairs":
        return Pairs(**{name: value[rows] for name, value in vars(self).items()})


class SPO(Loop):
    """At each step the best of k candidates against the worst, with a second UNet for the reference.

    The first steps may have no candidates. The published reward is given the time of a step; here it is the reward that
    all methods share, of the x_0 predicted at the step. The published loop takes an optimiser step after every
    micro-batch; here there is one for all of them.
    """

    def __init__(self, task: Task, *, candidates: int = 4, skip_first_steps: int = 4) -> None:
        self.reference = copy.deepcopy(task.pipeline.unet)
        super().__init__(task)
        self.networks += (self.reference,)
        self.candidates, self.skip_first_steps = candidates, skip_first_steps

    @torch.no_grad()
    def rollout(self) -> Pairs:
        """After the first step with candidates, all k of an image go through the UNet, in 2 k rows."""
        self.network.eval()
        prompts, conditioning, x = self.begin()
        images, k, dtype = len(x), self.candidates, x.dtype
        rows = torch.arange(images, device=self.device)
        wide = conditioning[rows.repeat(k)]
        found = []
        start, drawn, before = x, None, self.scheduler.timesteps[:1]
        for step_index, t in enumerate(self.scheduler.timesteps[:, None]):
            prediction = self.predict(self.network, x, t, conditioning if drawn is None else wide)
            x_0, mean, deviation = ddim_step(self.scheduler, prediction, t, x)
            if drawn is None:
                start = x
            else:
                found.append((start, before.expand(images), *self._compare(drawn, x_0, prompts)))
                picks = torch.randint(k, (images,), device=self.device)
                start, mean = drawn[picks, rows], mean.unflatten(0, (k, images))[picks, rows]
            if step_index < self.skip_first_steps:
                x = (mean + deviation * torch.randn_like(mean)).to(dtype)
            else:
                drawn = (mean + deviation * torch.randn(k, *mean.shape, device=self.device)).to(dtype)
                x, before = drawn.flatten(0, 1), t
        assert drawn is not None
        found.append((start, before.expand(images), *self._compare(drawn, x, prompts)))
        x_t, times, winner, loser, kept = (torch.cat(parts) for parts in zip(*found, strict=True))
        repeated = conditioning[rows.repeat(len(found))]
        return Pairs(x_t=x_t, winner=winner, loser=loser, times=times, conditioning=repeated)[kept]

    def _compare(
        self, drawn: Float[Tensor, "candidates images channels height width"], clean: Latents, prompts: list[str]
    ) -> tuple[Latents, Latents, Bool[Tensor, " images"]]:
        rewards = self.task.reward(self.backbone.decode(clean), prompts * self.candidates)
        best, worst, kept = extremes(rewards.to(self.device).reshape(drawn.shape[:2]))
        rows = torch.arange(len(best), device=self.device)
        return drawn[best, rows], drawn[worst, rows], kept

    def learn(self, pairs: Pairs) -> None:
        """Four forward passes of two rows a pair, although winner and loser have the same x_t."""
        if not len(pairs.times):
            raise ValueError("the candidates of every step have the same reward; expected different rewards")
        self.network.train()
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
    rewards: Float[Tensor, "candidates images"], threshold: float = 0.0
) -> tuple[Int[Tensor, " images"], Int[Tensor, " images"], Bool[Tensor, " images"]]:
    """Indices of the highest and lowest reward of each image, and whether these differ by more than the threshold."""
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
