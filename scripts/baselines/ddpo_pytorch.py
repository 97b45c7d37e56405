"""The training loop of kvablack/ddpo-pytorch, restated: `scripts/train.py` with `config/base.py`."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from stepfuse.scripts.baselines.training import Loop, PerSample, Samples, Task, ddim_step, mean_log_prob


@dataclass(frozen=True, kw_only=True)
class TimedSamples(Samples):
    """A rollout whose images have their steps in orders of their own."""

    times: Int[Tensor, "images steps"]


class DDPOPyTorch(Loop):
    """PPO on a LoRA, with classifier-free guidance in training as well, on a share of each image's steps.

    Advantages are normalised over the whole rollout, as its tracker does until a prompt has 16 rewards.
    """

    def __init__(self, task: Task, *, timestep_fraction: float = 1.0) -> None:
        super().__init__(task, wrap=Wrapped)  # accelerate adds autocast to this module alone; rollouts call the UNet
        self.learned = max(1, round(task.steps * timestep_fraction))

    @torch.no_grad()
    def rollout(self) -> TimedSamples:
        """Each step in one forward pass of two rows an image, with the LoRA on both."""
        self.network.eval()
        prompts, conditioning, x_t = self.begin()
        latents, log_probs = [x_t], []
        for t in self.scheduler.timesteps[:, None]:
            prediction = self.predict(self.network, x_t, t, conditioning)
            _, mean, deviation = ddim_step(self.scheduler, prediction, t, x_t)
            x_s = mean + deviation * torch.randn_like(prediction)
            log_probs.append(mean_log_prob(x_s, mean, deviation))
            x_t = x_s.to(x_t.dtype)
            latents.append(x_t)
        return TimedSamples(
            x_t=torch.stack(latents[:-1], dim=1),
            x_s=torch.stack(latents[1:], dim=1),
            log_prob=torch.stack(log_probs, dim=1),
            times=self.scheduler.timesteps.repeat(len(x_t), 1),
            advantage=self.advantages(x_t, prompts, epsilon=1e-8),
            conditioning=conditioning,
        )

    def learn(self, samples: TimedSamples) -> None:
        """A forward and backward pass of two rows an image, with the steps of each image shuffled."""
        self.network.train()
        images, steps = samples.times.shape
        rows = torch.randperm(images, device=self.device)
        order = torch.stack([torch.randperm(steps, device=self.device) for _ in range(images)])
        shuffled = {n: getattr(samples, n)[rows[:, None], order] for n in ("x_t", "times", "x_s", "log_prob")}
        conditioning, advantage = samples.conditioning[rows], samples.advantage[rows]
        for i in range(self.learned):
            x_t, t, x_s, old = (part[:, i] for part in shuffled.values())
            loss = ddpo_pytorch_loss(self.log_prob(self.trained, x_t, t, x_s, conditioning), old, advantage)
            self.task.accelerator.backward(loss / self.learned)


class Wrapped(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.unet(*arguments, **options)


def ddpo_pytorch_loss(log_prob: PerSample, old: PerSample, advantage: PerSample, clip_range: float = 1e-4) -> Tensor:
    """The mean of max(-A ρ, -A clamp(ρ, 1 ± clip_range)), with ρ = exp(log_prob - old) and A within ± 5."""
    advantage, ratio = advantage.clamp(-5, 5), (log_prob - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
