"""A policy of several objectives on the small UNet that training is tested on."""

import torch
from diffusers import DDIMScheduler

from stepfuse.fuse.rules.plan import Expert
from stepfuse.fuse.rules.registry import get_rule
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.rollout import sample_generator
from stepfuse.train.setup import make_policy
from tests.fixtures_tiny import denoiser_of, prompt_embeds
from tests.fixtures_training import BETAS, PROJECTIONS, SHAPE, tiny_unet

GUIDANCE_SCALE = 3.0


def joint_settings(kind, *objectives, **own):
    """Settings of a run with these objectives, whose LoRAs are those that `PolicyWorld` has one of."""
    common = dict(rank=4, lora_alpha=8, lora_target_modules=PROJECTIONS, seed=1)
    return kind(**common | {"objectives": list(objectives)} | own)


class JointWorld:
    """The policy of such settings with LoRAs that are not zero, and a place to sample at."""

    def __init__(self, settings, *, schedules=None, dtype=torch.float32, images=2):
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
        backbone = denoiser_of(tiny_unet(), scheduler, guidance="off").backbone
        names = [each.name for each in settings.each]
        schedules = schedules or [each.initial_schedule() for each in settings.each]
        self.policy = make_policy(backbone, settings, schedules)
        self.unet = backbone.network
        for name in names:
            generator = torch.Generator().manual_seed(2)
            for factor in self.factors(name, "lora_B").values():
                factor.data.normal_(std=0.1, generator=generator)
        self.policy.to(dtype)
        guidance = dict(guidance=settings.guidance, guidance_scale=GUIDANCE_SCALE)
        self.denoiser = denoiser_of(self.unet, scheduler, **guidance, batched=self.policy.rows)
        words = torch.randn(2, images, 6, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
        self.conditioning = prompt_embeds(words[0], words[1])
        self.sampling = Sampling(
            denoiser=self.denoiser,
            objectives=tuple(map(Expert.adapter, names, schedules)),
            rule=get_rule(settings.train_rule),
            steps=self.denoiser.path.steps(3),
            shape=SHAPE,
        )
        self.generators = [sample_generator(0, "rollout", i) for i in range(images)]

    @property
    def place(self):
        return self.sampling, self.conditioning, self.generators

    def factors(self, name, kind="lora_"):
        """The parameters of one LoRA."""
        return {key: value for key, value in self.unet.named_parameters() if f".{name}." in key and kind in key}
