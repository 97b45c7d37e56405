"""What the restated training loops of ddpo-pytorch, SPO and Flow-GRPO have in common.

What goes through which network, with and without gradient, what is decoded when, and what is stored follow the
published code. Where that is older, all get what stepfuse has: SDPA in place of explicit attention scores, LoRAs by
peft, and the scheduler's table on the device. All leave out logging, progress bars and images.
"""

import copy
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn

from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.backbones.registry import backbone_of
from stepfuse.fuse.backbones.unet import unet_arguments
from stepfuse.rewards.protocol import Reward
from stepfuse.train.lora import add_lora

PerSample = Float[Tensor, " batch"]
Times = Int[Tensor, " times"]  # one for all samples, or one a sample


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a loop trains, and on what."""

    pipeline: DiffusionPipeline  # frozen and without a LoRA; its denoising network is trained
    accelerator: Accelerator
    reward: Reward
    prompts: Sequence[str]
    targets: Sequence[str]  # the layers of the LoRA
    images: int  # of a rollout, all in one micro-batch
    steps: int
    resolution: int | None = None  # in pixels; by default the model's
    guidance_scale: float = 5.0
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A rollout that a policy gradient learns from."""

    x_t: Float[Tensor, "images steps channels height width"]
    x_s: Float[Tensor, "images steps channels height width"]
    log_prob: Float[Tensor, "images steps"]
    advantage: Float[Tensor, " images"]
    conditioning: Conditioning


class Loop(ABC):
    """AdamW on a LoRA, DDIM with eta 1, and guidance by the trained network, whose e_u are further rows.

    Attributes:
        table: the name of the scheduler's noise levels.
        embedded: the network's inputs that the pipeline's `encode_prompt` gives, in its order.
        further: its arguments beside those of all pipelines.
    """

    table: ClassVar[str] = "alphas_cumprod"
    embedded: ClassVar[Sequence[str]] = ("prompt_embeds", "text_embeds")
    further: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, task: Task, *, wrap: Callable[[nn.Module], nn.Module] = lambda network: network) -> None:
        self.task, self.pipeline, self.device = task, task.pipeline, task.accelerator.device
        self.backbone = backbone_of(self.pipeline)
        self.network: Any = self.backbone.network
        self.scheduler = copy.deepcopy(self.pipeline.scheduler)
        self.scheduler.set_timesteps(task.steps, device=self.device)
        setattr(self.scheduler, self.table, getattr(self.scheduler, self.table).to(self.device))
        side = task.resolution
        self.shape = self.backbone.shape(side, side)
        self.blank = self.backbone.encode([""], height=side, width=side, device=self.device)
        self.random = random.Random(0)
        add_lora(self.network, "baseline", rank=4, alpha=4, targets=list(task.targets), seed=0)
        if task.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self.trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, weight_decay=1e-4)
        self.trained, self.optimizer = task.accelerator.prepare(wrap(self.network), optimizer)
        self.networks: tuple[nn.Module, ...] = (self.network,)

    def advantages(self, latents: Latents, prompts: Sequence[str], epsilon: float) -> Float[Tensor, " images"]:
        """(r - mean) / (deviation + epsilon) of a rollout's rewards, computed by a thread as the published loops do."""
        with ThreadPoolExecutor(2) as threads:
            scores = threads.submit(self.task.reward, self.backbone.decode(latents), prompts)
        rewards = scores.result().to(self.device)
        return (rewards - rewards.mean()) / (rewards.std(correction=0) + epsilon)

    @abstractmethod
    def rollout(self) -> Any:
        """Sample images, and return what is learned from."""

    @abstractmethod
    def learn(self, samples: Any) -> None:
        """Accumulate the gradient of the mean loss on a rollout."""

    def step(self) -> None:
        self.learn(self.rollout())
        self.task.accelerator.clip_grad_norm_(self.trainable, max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def draw(self, count: int) -> list[str]:
        """The prompts of a rollout."""
        return self.random.choices(self.task.prompts, k=count)

    def begin(self) -> tuple[list[str], Conditioning, Latents]:
        """Prompts, their embeddings, computed each time, beside the one of "", and x_T."""
        count = self.task.images
        prompts = self.draw(count)
        positive, _, *pooled = self.pipeline.encode_prompt(
            prompt=prompts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **self.further,
        )
        blank = self.blank[torch.zeros(count, dtype=torch.long)]
        own = dict(zip(self.embedded, (positive, *pooled[:1]), strict=False))
        conditioning = Conditioning(positive={**blank.positive, **own}, negative=blank.negative)
        return prompts, conditioning, torch.randn(count, *self.shape, device=self.device, dtype=positive.dtype)

    def predict(self, network: nn.Module, x_t: Latents, t: Times, conditioning: Conditioning) -> Latents:
        """e_u + g (e_c - e_u), both by the network itself, in one forward pass of two rows an image."""
        times = t.expand(len(x_t)).repeat(2)
        inputs = unet_arguments(conditioning.inputs("-+"))
        output = network(torch.cat([x_t, x_t]), times, return_dict=False, **inputs)[0]
        negative, positive = output.chunk(2)
        return negative + self.task.guidance_scale * (positive - negative)

    def log_prob(
        self, network: nn.Module, x_t: Latents, t: Times, x_s: Latents, conditioning: Conditioning
    ) -> PerSample:
        """log p(x_s | x_t)."""
        _, mean, deviation = ddim_step(self.scheduler, self.predict(network, x_t, t, conditioning), t, x_t)
        return mean_log_prob(x_s, mean, deviation)


def ddim_step(scheduler: DDIMScheduler, prediction: Latents, t: Times, x_t: Latents) -> tuple[Latents, Latents, Tensor]:
    """x_0, and mean and standard deviation of x_s, with eta 1 (DDIM, arXiv:2010.02502, eq. 12 and 16).

    x_0 = (x_t - sqrt(1 - ā_t) e) / sqrt(ā_t),     s = max(t - 1000 / steps, 0)
    v = (1 - ā_s) / (1 - ā_t) (1 - ā_t / ā_s),     mean = sqrt(ā_s) x_0 + sqrt(1 - ā_s - v) e
    """
    s = (t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps).clamp(min=0)
    a_t, a_s = (scheduler.alphas_cumprod[time].reshape(-1, 1, 1, 1) for time in (t, s))
    if scheduler.config.prediction_type == "v_prediction":
        x_0 = a_t.sqrt() * x_t - (1 - a_t).sqrt() * prediction
        e = a_t.sqrt() * prediction + (1 - a_t).sqrt() * x_t
    else:
        x_0, e = (x_t - (1 - a_t).sqrt() * prediction) / a_t.sqrt(), prediction
    variance = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    return x_0, a_s.sqrt() * x_0 + (1 - a_s - variance).sqrt() * e, variance.sqrt()


def mean_log_prob(x: Latents, mean: Latents, deviation: Tensor) -> PerSample:
    """log N(x; mean, deviation²): its mean over dimensions, not the sum."""
    terms = -((x - mean) ** 2) / (2 * deviation**2) - deviation.log() - 0.5 * math.log(2 * math.pi)
    return terms.mean(dim=(1, 2, 3))
