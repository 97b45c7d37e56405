"""Validation images at several weights of the objectives: what they show, in numbers and captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stepfuse.data.grid import CELL
from stepfuse.data.images import to_image
from stepfuse.data.lettering import enlarge, enlargement
from stepfuse.rewards.statistics import Interval, paired_interval
from stepfuse.train.checkpoints import Progress
from stepfuse.train.joint_settings import CENTRE

SHOWN = 16  # images that are logged


@dataclass(frozen=True, kw_only=True)
class Point:
    """Weights that validation images are drawn with: all on one objective, which names the point, or equal ones."""

    name: str
    weights: tuple[float, ...]


def validation_points(names: Sequence[str]) -> list[Point]:
    """One point for each objective, and for several of them the centre."""
    count = len(names)
    points = [Point(name=name, weights=tuple(float(i == k) for i in range(count))) for k, name in enumerate(names)]
    return points if count == 1 else [*points, Point(name=CENTRE, weights=(1 / count,) * count)]


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation images in the order of their prompts, the same on every process."""

    points: list[Point]
    pixels: Float[Tensor, "points images 3 height width"]
    rewards: Float[Tensor, "points images objectives"]  # before they are shaped

    def summary(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Mean, deviation and number of the rewards; of several objectives, of their weighted sums and of each.

        Args:
            before: the summary of the images before training, in whose deviations several rewards are measured; empty
                for those images themselves.
        """
        if len(self.points) == 1:
            return _statistics(self.rewards[0, :, 0])
        by_point = {
            point.name: {self.points[i].name: _statistics(column) for i, column in enumerate(rewards.unbind(1))}
            for point, rewards in zip(self.points, self.rewards, strict=True)
        }
        units = [before.get("points", by_point)[each.name][each.name]["deviation"] for each in self.points[:-1]]
        weights = self.rewards.new_tensor([point.weights for point in self.points])
        scaled = self.rewards / self.rewards.new_tensor([unit or 1.0 for unit in units])
        return _statistics((scaled * weights[:, None]).sum(2).flatten()) | {"points": by_point}

    def as_lists(self) -> Any:
        """The rewards by image; of several objectives, by point and objective."""
        if len(self.points) == 1:
            return self.rewards[0, :, 0].tolist()
        return {
            point.name: {self.points[i].name: column.tolist() for i, column in enumerate(rewards.unbind(1))}
            for point, rewards in zip(self.points, self.rewards, strict=True)
        }


def _statistics(rewards: Tensor) -> dict[str, float]:
    return {
        "reward": rewards.mean().item(),
        "deviation": rewards.std(correction=0).item(),
        "images": len(rewards),
    }


def objective_validation(progress: Progress, name: str) -> dict[str, Any]:
    """The summaries of one objective by moment: with all weight on it, if the run has several."""
    of = progress.validation
    return {moment: summary["points"][name][name] if "points" in summary else summary for moment, summary in of.items()}


def objective_rewards(progress: Progress, point: str, name: str) -> dict[str, Sequence[float]]:
    """The rewards of the validation images by moment; of several objectives, those of one at one point."""
    rewards: dict[str, Any] = dict(progress.validation_rewards)
    if "points" not in progress.validation.get("before", {}):
        return rewards
    return {moment: by_point[point][name] for moment, by_point in rewards.items()}


def paired_gain(rewards: Mapping[str, Sequence[float]], prompts: Sequence[str]) -> Interval | None:
    """The mean of the reward after training minus that before, over pairs of images of the same prompt and noise.

    None where rewards of a moment are not known, as in a checkpoint of an earlier version, and for a single prompt.
    """
    if not rewards.get("before") or not rewards.get("after") or len(set(prompts)) < 2:
        return None
    return paired_interval(rewards["after"], rewards["before"], prompts)


def label_rewards(points: Sequence[Point], rewards: Float[Tensor, " objectives"]) -> str:
    """The rewards of an image for its caption."""
    if len(points) == 1:
        return f"reward {rewards.item():.4g}"
    return ", ".join(f"{point.name} {reward:.4g}" for point, reward in zip(points, rewards.tolist(), strict=False))


def captioned(
    prompts: Sequence[str], validation: Validation, base: Validation | None, index: int
) -> tuple[list[Image.Image], list[str]]:
    """The first images of a point, to the right of the base model's if there are any, and captions with prompt and
    rewards.
    """
    images, captions, points = [], [], validation.points
    factor = enlargement(to_image(validation.pixels[index, 0]), CELL)
    for i, prompt in enumerate(prompts[:SHOWN]):
        pixels, rewards = validation.pixels[index, i], label_rewards(points, validation.rewards[index, i])
        if base is not None:
            pixels = torch.cat([base.pixels[index, i], pixels], dim=-1)
            before = label_rewards(points, base.rewards[index, i])
            rewards = f"base, left: {before.removeprefix('reward ')}; right: {rewards.removeprefix('reward ')}"
        images.append(enlarge(to_image(pixels), factor))
        captions.append(f"{prompt}\n{rewards}")
    return images, captions
