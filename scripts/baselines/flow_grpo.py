"""The training loop of yifan123/flow_grpo, restated: `scripts/train_sd3.py` and `config/grpo.py` (arXiv:2505.05470)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.scripts.baselines.ddpo_pytorch import ddpo_pytorch_loss
from stepfuse.scripts.baselines.training import Loop, Samples, Task, Times, mean_log_prob


class FlowGRPO(Loop):
    """GRPO on the Euler-Maruyama steps of an SDE, with classifier-free guidance in training as well.

    The clipped loss is that of ddpo-pytorch, to which a KL divergence to the base is added.

    A rollout is one group: all its images have the same prompt. The published loop takes no step on images of advantage
    0, keeps a moving average of the LoRA, and has rank 32; here no image is left out, there is no average, and the LoRA
    is that of all methods.
    """

    table = "sigmas"
    embedded = ("prompt_embeds", "pooled_prompt_embeds")
    further: ClassVar = {"prompt_2": None, "prompt_3": None}

    def __init__(
        self, task: Task, *, timestep_fraction: float = 1.0, noise_level: float = 0.7, beta: float = 0.04
    ) -> None:
        super().__init__(task)
        # Its configurations learn from a share of 0.99, which leaves out the last step.
        self.learned = max(1, min(round(task.steps * timestep_fraction), task.steps - 1))
        self.noise_level, self.beta = noise_level, beta

    def draw(self, count: int) -> list[str]:
        return [self.random.choice(self.task.prompts)] * count

    @torch.no_grad()
    def rollout(self) -> Samples:
        """Each step in one forward pass of two rows an image, with the LoRA on both."""
        self.network.eval()
        prompts, conditioning, x_t = self.begin()
        dtype = x_t.dtype
        latents, log_probs = [x_t.float()], []
        for i in range(self.task.steps):
            mean, deviation, _ = self.gaussian(self.network, x_t, i, conditioning)
            x_s = mean + deviation * torch.randn_like(mean)
            log_probs.append(mean_log_prob(x_s, mean, deviation))
            latents.append(x_s)
            x_t = x_s.to(dtype)
        return Samples(
            x_t=torch.stack(latents[:-1], dim=1),
            x_s=torch.stack(latents[1:], dim=1),
            log_prob=torch.stack(log_probs, dim=1),
            advantage=self.advantages(x_t, prompts, epsilon=1e-4),
            conditioning=conditioning,
        )

    def learn(self, samples: Samples) -> None:
        """Of each of the first steps two forward passes of two rows an image, policy and base, and one backward pass.

        The base is the network with its LoRA switched off.
        """
        self.network.train()
        for i in range(self.learned):
            of_step = self.trained, samples.x_t[:, i], i, samples.conditioning
            mean, deviation, diffusion = self.gaussian(*of_step)
            loss = ddpo_pytorch_loss(
                mean_log_prob(samples.x_s[:, i], mean, deviation), samples.log_prob[:, i], samples.advantage
            )
            if self.beta > 0:
                with torch.no_grad(), without_adapters(self.network):
                    base, _, _ = self.gaussian(*of_step)
                loss = loss + self.beta * flow_grpo_kl(mean, base, diffusion)
            self.task.accelerator.backward(loss / self.learned)

    def predict(self, network: nn.Module, x_t: Latents, t: Times, conditioning: Conditioning) -> Latents:
        """v_u + g (v_c - v_u), both by the network itself in one forward pass; no gradient goes through v_u."""
        times, inputs = t.expand(2 * len(x_t)), conditioning.inputs("-+")
        negative, positive = self.backbone.predict(torch.cat([x_t, x_t]), times, inputs, network=network).chunk(2)
        negative = negative.detach()
        return negative + self.task.guidance_scale * (positive - negative)

    def gaussian(
        self, network: nn.Module, x_t: Latents, i: int, conditioning: Conditioning
    ) -> tuple[Latents, Tensor, Tensor]:
        """Mean and standard deviation of x_s in step i, and the diffusion coefficient g."""
        velocity = self.predict(network, x_t, self.scheduler.timesteps[i : i + 1], conditioning)
        return euler_maruyama(self.scheduler.sigmas, velocity, i, x_t.float(), self.noise_level)


def euler_maruyama(
    sigmas: Float[Tensor, " levels"], velocity: Latents, i: int, x_t: Latents, noise_level: float
) -> tuple[Latents, Tensor, Tensor]:
    """Mean and standard deviation of x_s, and g, of the step from sigma_i = t to sigma_i+1 = s (eq. 9 of the paper).

    g = a sqrt(t / (1 - t)),     mean = x_t + [v + g² / (2 t) (x_t + (1 - t) v)] (s - t),     deviation = g sqrt(t - s)

    Where t is 1, and g infinite, sigma_1 takes the place of t in 1 - t.
    """
    t, s = sigmas[i], sigmas[i + 1]
    diffusion = noise_level * (t / (1 - torch.where(t == 1, sigmas[1], t))).sqrt()
    drift = velocity + diffusion**2 / (2 * t) * (x_t + (1 - t) * velocity)
    return x_t + drift * (s - t), diffusion * (t - s).sqrt(), diffusion


def flow_grpo_kl(mean: Latents, base: Latents, diffusion: Tensor) -> Tensor:
    """The mean of |mean - base|² / (2 g²) over images and dimensions: without the length of the step, t - s."""
    return ((mean - base) ** 2).mean() / (2 * diffusion**2)


@contextmanager
def without_adapters(network: Any) -> Iterator[None]:
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()
