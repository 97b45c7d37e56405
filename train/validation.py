"""Images of the policy as it stands, drawn by all processes together, and their reward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from stepfuse.data.prompts import load_prompts
from stepfuse.data.text_files import printable
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.train.settings import TrainSettings

Draw = Callable[[Sequence[str], Sequence[int]], Pixels]
DRAWN_BY = (
    *("seed", "reward", "sample_num_steps", "guidance", "sample_guidance_scale", "resolution"),
    *("variance", "sample_eta", "sample_etas"),
)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation images in the order of their prompts, the same on every process."""

    prompts: list[str]
    pixels: Pixels
    rewards: Scores

    def first(self, count: int) -> "Validation":
        """The first images only, in memory of their own."""
        pixels, rewards = self.pixels[:count].clone(), self.rewards[:count].clone()
        return Validation(prompts=self.prompts[:count], pixels=pixels, rewards=rewards)

    def summary(self) -> dict[str, float]:
        return {
            "reward": self.rewards.mean().item(),
            "deviation": self.rewards.std(correction=0).item(),
            "images": len(self.prompts),
        }


def validation_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that validation images and their rewards depend on, besides the prompts."""
    return {name: getattr(settings, name) for name in DRAWN_BY}


def validation_prompts(settings: TrainSettings, training: list[str]) -> list[str]:
    """As many prompts as there are to be images: given ones, those of a set, or some of the training ones."""
    wanted = [printable(text) for text in settings.validation_prompts] or training  # they may be arguments
    if settings.validation_set:
        wanted = load_prompts(settings.validation_set)
    count = settings.num_validation_images
    return [wanted[i * len(wanted) // count if count < len(wanted) else i % len(wanted)] for i in range(count)]


def draw_together(
    accelerator: Accelerator, prompts: Sequence[str], batch_size: int, draw: Draw
) -> Iterator[tuple[list[str], Pixels]]:
    """This process's share, a batch at a time: prompts and pixels.

    Every process has as many batches as any other, for with ZeRO-3 a forward is a matter of all; where prompts do not
    divide, the last processes draw some of the first again.

    Args:
        draw: prompts and their places → pixels, the same for a place whoever draws it.
    """
    each = -(-len(prompts) // accelerator.num_processes)
    first = accelerator.process_index * each
    for start in range(first, first + each, batch_size):
        places = [place % len(prompts) for place in range(start, min(start + batch_size, first + each))]
        batch = [prompts[place] for place in places]
        yield batch, draw(batch, places)


def gathered(accelerator: Accelerator, own: Tensor, count: int) -> Tensor:
    """The shares of all processes, in order, without what was drawn twice; on the CPU."""
    return accelerator.gather(own.contiguous())[:count].cpu()


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    prompts: list[str],
    batch_size: int,
    draw: Draw,
    score: Callable[[Pixels, Sequence[str]], Scores],
) -> Validation:
    """Draw and score the validation images."""
    pixels, rewards = [], []
    for batch, images in draw_together(accelerator, prompts, batch_size, draw):
        rewards.append(score(images, batch))
        pixels.append(images)
    return Validation(
        prompts=prompts,
        pixels=gathered(accelerator, torch.cat(pixels), len(prompts)),
        rewards=gathered(accelerator, torch.cat(rewards), len(prompts)),
    )
