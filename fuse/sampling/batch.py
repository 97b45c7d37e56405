"""What one batch of images gives to the rule that denoises it: predictions and rewards."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.noise_path import Time
from stepfuse.fuse.lora.mixture import Network, Rows
from stepfuse.fuse.rules.plan import Plan
from stepfuse.fuse.rules.step import PredictFn, Score
from stepfuse.rewards.protocol import Reward, score


def predict_batch(denoiser: Denoiser, plan: Plan, conditioning: Conditioning) -> PredictFn:
    """Guided predictions of a batch, and those without guidance at steps outside the plan's interval."""
    unguided = replace(denoiser, guidance=replace(denoiser.guidance, source="off"))
    guided_times = {t for step_index, (t, _) in enumerate(plan.steps) if plan.is_guided(step_index)}

    def predict(
        x_t: Latents, t: Time, networks: Sequence[Network], images: Rows, rows: Sequence[Rows | None]
    ) -> list[Latents]:
        used = denoiser if t in guided_times else unguided
        return used.predictions(x_t, t, conditioning[images.to(x_t.device)], networks, rows)

    return predict


def score_batch(reward: Reward, name: str, backbone: Backbone, prompts: Sequence[str]) -> Score:
    """A reward as a function of x_0 latents and of which images of the batch they belong to."""

    def score_latents(clean: Latents, images: Rows) -> Float[Tensor, " rows"]:
        return score(reward, backbone.decode(clean), [prompts[i] for i in images.tolist()], name=name)

    return score_latents
