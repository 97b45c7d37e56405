"""The rewards that a run is trained on: shaped or fitted, and computed while the next batch is sampled."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stepfuse.fuse.backbones.base import Backbone
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.rewards.protocol import Pixels, close
from stepfuse.rewards.registry import check_reward_dtype, load_reward
from stepfuse.rewards.reward_name import parse_reward
from stepfuse.rewards.scoring_queue import ScoringQueue
from stepfuse.rewards.shaping import Shaping
from stepfuse.rewards.weighted import as_sum
from stepfuse.train.health import thumbnails
from stepfuse.train.settings import TrainSettings


class ObjectiveReward:
    """The reward of one objective as a sum of terms, and its shaping.

    Attributes:
        reward: the unshaped reward.
        name: its name; of a weighted one, with the scales that were fitted.
        shaping: as configured or fitted.
    """

    def __init__(self, settings: TrainSettings, device: str | torch.device) -> None:
        reward = load_reward(settings.reward, device, getattr(torch, settings.reward_dtype))
        self.reward, self.name = as_sum(reward, settings.reward), settings.reward
        self.shaping = Shaping(shift=settings.reward_shift, scale=settings.reward_scale, clip=settings.reward_clip)
        if settings.fit_reward:
            self.reward.check_fit()
        self.asked = {"reward": settings.reward, "images": settings.fit_reward, "clip": settings.reward_clip}
        self.finite = settings.nonfinite == "stop"

    def terms(self, pixels: Pixels, prompts: Sequence[str]) -> Float[Tensor, "images terms"]:
        """The terms of the reward, which sum to it; the shaped reward, if it is shaped.

        Numbers that are not finite are an error, or are left for the loop to drop (`nonfinite`).
        """
        terms = self.reward.terms_of(pixels, prompts, finite=self.finite)
        return terms if self.shaping == Shaping() else self.shaping(terms.sum(1))[:, None]

    def term_weights(self) -> Float[Tensor, " terms"]:
        """The weights w_i of these terms."""
        return self.reward.weights if self.shaping == Shaping() else torch.ones(1)

    def fit(self, columns: Float[Tensor, "images terms"]) -> dict[str, Any]:
        """Name and shaping from the unshaped terms of images of the base, as values that `restore` takes.

        Raises:
            ValueError: for a reward, or a term, that is the same for all images.
        """
        name, shaping = self.reward.fit(columns, self.shaping)
        return {"asked": self.asked, "reward": name, "shaping": dataclasses.asdict(shaping)}

    def restore(self, fitted: dict[str, Any]) -> None:
        """Use what was fitted, now or before a checkpoint; with other settings that is a ValueError."""
        if fitted["asked"] != self.asked:
            was, now = (f"{a['reward']!r} on {a['images']} images" for a in (fitted["asked"], self.asked))
            raise ValueError(f"the checkpoint's reward was fitted as {was}, and now it is {now}; resume with the same")
        self.name, self.shaping = fitted["reward"], Shaping(**fitted["shaping"])
        self.reward = self.reward.with_terms(parse_reward(self.name).terms)


class TrainingReward:
    """The rewards of a run, one for each objective, and the queue that they are computed in.

    Attributes:
        names: of the objectives.
        objectives: the reward of each.
        faults: for each objective, what is said of a reward of it that is not finite.
    """

    def __init__(self, settings: TrainSettings, device: str | torch.device = "cpu") -> None:
        self.names = [each.name for each in settings.each]
        several = len(self.names) > 1
        self.faults = [f"a reward {f'of {name} ' if several else ''}that is not finite" for name in self.names]
        for dtype in {each.reward_dtype for each in settings.each}:
            names = [each.reward for each in settings.each if each.reward_dtype == dtype]
            check_reward_dtype(names, getattr(torch, dtype))
        self.objectives: list[ObjectiveReward] = []
        try:
            for each in settings.each:
                self.objectives.append(ObjectiveReward(each, device))
        except ValueError:
            self._close_rewards()
            raise
        self.queue = ScoringQueue(ahead=2 if settings.async_scoring else 0, device=device)

    def columns(self, pixels: Pixels, prompts: Sequence[str]) -> list[Float[Tensor, "images terms"]]:
        """The terms of each objective."""
        return [objective.terms(pixels, prompts) for objective in self.objectives]

    def unshaped(self, pixels: Pixels, prompts: Sequence[str]) -> Float[Tensor, "images objectives"]:
        """The rewards before they are shaped."""
        return torch.stack([objective.reward(pixels, prompts) for objective in self.objectives], dim=1)

    def column_weights(self, weights: Float[Tensor, "all objectives"]) -> Float[Tensor, "all columns"]:
        """The weights of the columns that advantages are computed from: the terms of one objective, or the objectives.

        Args:
            weights: of the objectives for each image.
        """
        (first, *others) = self.objectives
        return weights if others else first.term_weights().expand(len(weights), -1)

    def close(self) -> None:
        """Wait for rewards that are being computed, and stop workers."""
        self.queue.close()
        self._close_rewards()

    def _close_rewards(self) -> None:
        for objective in self.objectives:
            close(objective.reward)


class Scorer:
    """The latents of one micro-batch → their future rewards: decoded at once, scored in the queue.

    Attributes:
        thumbnails: of the images of `terms`.
        faulty: for each of `TrainingReward.faults`, prompts of images with such a reward, if that is no error.
    """

    def __init__(self, reward: TrainingReward, backbone: Backbone, prompts: Sequence[str], step: int) -> None:
        self.reward, self.backbone, self.prompts, self.step = reward, backbone, prompts, step
        self.faulty: dict[str, list[str]] = {what: [] for what in reward.faults}

    def __call__(self, latents: Latents) -> "Future[Float[Tensor, 'images objectives']]":
        """The rewards of one or more consecutive latents per prompt."""
        copies = len(latents) // len(self.prompts)
        prompts = [prompt for prompt in self.prompts for _ in range(copies)]
        pixels = self._decode(latents)
        return self.reward.queue.submit(lambda: _sums(self._columns(pixels, prompts)), pixels)

    def terms(self, latents: Latents) -> "Future[Float[Tensor, 'images columns']]":
        """The terms of one objective, or the rewards of several, of one latent per prompt."""
        pixels = self._decode(latents)
        self.thumbnails = thumbnails(pixels)
        return self.reward.queue.submit(lambda: _one_table(self._columns(pixels, self.prompts)), pixels)

    @torch.no_grad()
    def _decode(self, latents: Latents) -> Pixels:
        with torch.inference_mode(False):  # a reward may be code of the user that computes gradients
            return self.backbone.decode(latents.clone())

    def _columns(self, pixels: Pixels, prompts: Sequence[str]) -> list[Float[Tensor, "images terms"]]:
        try:
            columns = self.reward.columns(pixels, prompts)
        except ValueError as error:
            raise ValueError(f"step {self.step + 1}: {error}; training stopped, checkpoints are kept") from error
        for objective, terms, faulty in zip(self.reward.objectives, columns, self.faulty.values(), strict=True):
            if not objective.finite:  # others are finite, or were an error
                faulty += compress(prompts, (~torch.isfinite(terms).all(1)).tolist())
        return columns


def _sums(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack([terms.sum(1) for terms in columns], dim=1)


def _one_table(columns: Sequence[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else _sums(columns)
