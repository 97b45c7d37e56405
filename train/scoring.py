"""What a run learns from: its reward in the unit it learns in, scored while the next batch is sampled."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.backbones.denoiser import Latents
from stepfuse.fuse.backbones.unet import decode_latents
from stepfuse.rewards.protocol import Pixels, Reward, Scores, close, score
from stepfuse.rewards.scoring_queue import ScoringQueue
from stepfuse.rewards.shaping import Shaping, fit_shaping
from stepfuse.rewards.weighted import Weighted, check_unscaled, fit_scales, label_terms, parse_terms
from stepfuse.train.health import thumbnails
from stepfuse.train.settings import TrainSettings


class TrainingReward:
    """A reward, its shaping, and the queue it is scored in.

    Attributes:
        name: of the reward; of a weighted one with the scales that were fitted.
        shaping: as configured or fitted.
    """

    def __init__(self, reward: Reward, settings: TrainSettings, device: str | torch.device = "cpu") -> None:
        if settings.fit_reward and isinstance(reward, Weighted):
            check_unscaled(reward.terms)
        self.reward, self.name, self.shaping = reward, settings.reward, settings.initial_shaping()
        self.asked = {"reward": settings.reward, "images": settings.fit_reward, "clip": settings.reward_clip}
        self.finite = settings.nonfinite == "stop"
        self.queue = ScoringQueue(ahead=2 if settings.async_scoring else 0, device=device)

    def raw(self, pixels: Pixels, prompts: Sequence[str]) -> Scores:
        """In the reward's own unit, at once."""
        return score(self.reward, pixels, prompts, name=self.name)

    def terms(self, pixels: Pixels, prompts: Sequence[str]) -> Float[Tensor, "images terms"]:
        """The columns of a weighted reward, which sum to it; one, shaped, of any other.

        Numbers that are not finite are refused, or let through for the loop to leave out (`nonfinite`).
        """
        if isinstance(self.reward, Weighted) and self.shaping == Shaping():
            return self.reward.terms_of(pixels, prompts, finite=self.finite)
        return self.shaping(score(self.reward, pixels, prompts, name=self.name, finite=self.finite))[:, None]

    def term_weights(self) -> Float[Tensor, " terms"]:
        """w_i of those columns."""
        if isinstance(self.reward, Weighted) and self.shaping == Shaping():
            return torch.tensor([term.weight for term in self.reward.terms])
        return torch.ones(1)

    def columns(self, pixels: Pixels, prompts: Sequence[str]) -> Float[Tensor, "images terms"]:
        """What is fitted: the terms of a weighted reward, or the reward, unshaped."""
        if isinstance(self.reward, Weighted):
            return self.reward.terms_of(pixels, prompts)
        return self.raw(pixels, prompts)[:, None]

    def fit(self, columns: Float[Tensor, "images terms"]) -> dict[str, Any]:
        """Name and shaping by images of the base, of `columns`, as values that `restore` takes.

        The terms of a weighted reward get the deviations they have among them; any other reward mean 0 and deviation 1.

        Raises:
            ValueError: for a reward, or a term, that is the same for all of them.
        """
        name, shaping = self.name, self.shaping
        if isinstance(self.reward, Weighted):
            name = label_terms(fit_scales(self.reward.terms, columns))
        else:
            shaping = fit_shaping(columns[:, 0], self.shaping.clip)
        return {"asked": self.asked, "reward": name, "shaping": dataclasses.asdict(shaping)}

    def restore(self, fitted: dict[str, Any]) -> None:
        """Take what was fitted, now or before a checkpoint.

        Raises:
            ValueError: where something else was asked for then.
        """
        if fitted["asked"] != self.asked:
            was, now = (f"{a['reward']!r} on {a['images']} images" for a in (fitted["asked"], self.asked))
            raise ValueError(f"the checkpoint's reward was fitted as {was}, and now it is {now}; resume with the same")
        self.name, self.shaping = fitted["reward"], Shaping(**fitted["shaping"])
        if isinstance(self.reward, Weighted):
            self.reward = Weighted(parse_terms(self.name.partition(":")[2]), self.reward.rewards.__getitem__)

    def close(self) -> None:
        """Let what is being scored come to its end, and end workers."""
        self.queue.close()
        close(self.reward)


class Scorer:
    """Latents of one micro-batch → rewards to be: decoded at once, scored in the queue.

    Attributes:
        thumbnails: of the images `terms` was asked for.
        faulty: prompts of images whose reward is not finite, where those are let through.
    """

    def __init__(self, reward: TrainingReward, pipeline: DiffusionPipeline, prompts: Sequence[str], step: int) -> None:
        self.reward, self.pipeline, self.prompts, self.step = reward, pipeline, prompts, step
        self.faulty: list[str] = []

    def __call__(self, latents: Latents, copies: int) -> "Future[Tensor]":
        """(images,) of `copies` latents a prompt, which lie together."""
        prompts = [prompt for prompt in self.prompts for _ in range(copies)]
        return self._submit(self._decode(latents), prompts, lambda terms: terms.sum(1))

    def terms(self, latents: Latents) -> "Future[Tensor]":
        """(images, terms) of one latent a prompt."""
        pixels = self._decode(latents)
        self.thumbnails = thumbnails(pixels)
        return self._submit(pixels, self.prompts, lambda terms: terms)

    @torch.no_grad()
    def _decode(self, latents: Latents) -> Pixels:
        with torch.inference_mode(False):  # a reward may be anybody's code, and want a gradient of its own
            return decode_latents(self.pipeline, latents.clone())

    def _submit(self, pixels: Pixels, prompts: Sequence[str], reduce: Callable[[Tensor], Tensor]) -> "Future[Tensor]":

        def call() -> Tensor:
            try:
                terms = self.reward.terms(pixels, prompts)
                bad = ~torch.isfinite(terms).all(1)
                self.faulty += [prompt for prompt, wrong in zip(prompts, bad.tolist(), strict=True) if wrong]
                return reduce(terms)
            except ValueError as error:
                raise ValueError(f"step {self.step + 1}: {error}; training stopped, checkpoints are kept") from error

        return self.reward.queue.submit(call)
