"""Preference pairs of a data set instead of rollouts: Diffusion-DPO (arXiv:2311.12908)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import ClassVar

import torch
from jaxtyping import Float, Real
from PIL import Image, ImageOps
from torch import Tensor, nn

from stepfuse.data.devices import to_device
from stepfuse.data.images import to_pixels
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Branch, Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.train.algorithm import AlignmentAlgorithm, Batch, Source, StepGaussians, preference_loss
from stepfuse.train.checkpoints import Progress
from stepfuse.train.health import Health
from stepfuse.train.preference_pairs import Pair, PreferencePairs
from stepfuse.train.rollout import Sampling, sample_generator
from stepfuse.train.settings import DPOSettings
from stepfuse.train.setup import Setup


@dataclass(frozen=True, kw_only=True)
class NoisedPairs:
    """Images of a data set at one noise level each, the winners of all pairs before their losers.

    Attributes:
        target: what a network that knew the image would predict.
        reference: what the base predicts.
    """

    x_t: Latents
    times: Real[Tensor, " batch"]
    target: Latents
    reference: Latents


@torch.no_grad()
def collect_pairs(setup: Setup, pairs: Iterator[Pair], step: int) -> tuple[list[Batch[NoisedPairs]], dict[str, float]]:
    """This process's micro-batches of the next pairs, which every process reads; nothing is measured."""
    denoiser, all_pairs = setup.sampling.denoiser, list(islice(pairs, setup.total_batch_size))
    batches = []
    for rows in setup.micro_batches():
        own = [all_pairs[i] for i in rows]
        generators = [sample_generator(setup.settings.seed, "pairs", step, i) for i in rows]
        winner = encode_images(setup, [pair.winner() for pair in own], generators)
        loser = encode_images(setup, [pair.loser() for pair in own], generators)
        # one noise and one time per pair, so that winner and loser differ by the image alone
        noise = torch.stack([torch.randn(winner.shape[1:], generator=g) for g in generators])
        noise = to_device(noise, winner.device, winner.dtype)
        times = torch.cat([denoiser.path.draw(g) for g in generators])
        prompts = [pair.prompt for pair in own]
        conditioning = setup.embed([*prompts, *prompts])
        with setup.accelerator.autocast():
            noised = noise_pairs(denoiser, winner, loser, noise, times, conditioning)
        batches.append(Batch(prompts=prompts, steps=[noised], conditioning=conditioning))
    return batches, {}


def encode_images(setup: Setup, images: Sequence[Image.Image], generators: list[torch.Generator]) -> Latents:
    """Images scaled to the base's size by the shorter side, cropped in the centre and encoded."""
    height, width = setup.backbone.size()
    fitted = [ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR) for image in images]
    return setup.backbone.encode_pixels(torch.stack([to_pixels(image) for image in fitted]), generators)


@torch.no_grad()
def noise_pairs(
    denoiser: Denoiser,
    winner: Latents,
    loser: Latents,
    noise: Latents,
    times: Real[Tensor, " pairs"],
    conditioning: Conditioning,
) -> NoisedPairs:
    """x_t = alpha_t x_0 + sigma_t e of both images of each pair, and the base's prediction there.

    Args:
        noise, times: e and t, one per pair.
        conditioning: of the winners, and again of the losers.
    """
    path = denoiser.path
    clean, e, t = torch.cat([winner, loser]), torch.cat([noise, noise]), torch.cat([times, times])
    x_t = path.noised(clean, e, t)
    (reference,) = denoiser.run(x_t, t, conditioning, [Branch(BASE, "+")])
    return NoisedPairs(x_t=x_t, times=t, target=path.target(clean, e, t), reference=reference)


class DiffusionDPO(AlignmentAlgorithm[NoisedPairs]):
    """Diffusion-DPO on noised pairs: each prediction is the mean of a Gaussian of variance 1.

        log p(target) = -|target - prediction|² / 2,    L = dpo_loss of winner and loser

    With `log_prob_reduction: mean` that is, for mean squared errors l,

        L = -log sigmoid(-beta/2 [(l_winner - l_winner,ref) - (l_loser - l_loser,ref)])

    as in the code of arXiv:2311.12908 and in diffusers' script for SDXL; the script for SD 1.5 leaves out the 1/2, so
    its beta_dpo is half of this beta.
    """

    settings: DPOSettings
    name: ClassVar[str] = "diffusion-dpo"
    measures_kl = False

    def source(self, setup: Setup, progress: Progress, health: Health) -> Source[NoisedPairs]:
        pairs = PreferencePairs(self.settings.pairs, self.settings)
        return partial(collect_pairs, setup, pairs(progress.step * setup.total_batch_size))

    def gaussians(
        self, policy: nn.Module, sampling: Sampling, steps: Sequence[NoisedPairs], conditioning: Conditioning
    ) -> Sequence[StepGaussians]:
        """Policy and base of the one step of a batch, without guidance, as in pre-training."""
        (step,) = steps
        times = sampling.denoiser.path.network_time(step.times).to(step.x_t.device)
        output, _ = policy(step.x_t, times, **conditioning.inputs("+"))
        variance = step.x_t.new_ones(1, 1, 1, 1)
        ours = Gaussian(mean=output.to(torch.float32), variance=variance)
        return [(ours, Gaussian(mean=step.reference, variance=variance))]

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: NoisedPairs) -> Float[Tensor, " pairs"]:
        """One value per pair."""
        assert reference is not None  # every pair has one
        scale = self.log_prob_scale(step.x_t)
        log_probs = [part for p in (policy, reference) for part in (p.log_prob(step.target) * scale).chunk(2)]
        return preference_loss(self.settings, self.settings.beta, *log_probs)
