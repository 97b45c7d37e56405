"""The validation images of a run: drawn by all processes together, scored, saved and compared."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from stepfuse.data.grid import CELL, captioned_grid
from stepfuse.data.images import to_image
from stepfuse.data.lettering import enlarge, enlargement
from stepfuse.data.prompts import load_prompts
from stepfuse.data.text_files import printable
from stepfuse.fuse.sampling.finite import check_latents, decode_finite
from stepfuse.rewards.protocol import Pixels, Scores
from stepfuse.train.checkpoints import Progress
from stepfuse.train.rollout import rollout, sample_generator
from stepfuse.train.settings import TrainSettings
from stepfuse.train.setup import Setup
from stepfuse.train.trackers import log_images

SHOWN = 16  # images that are logged
DRAWN_BY = (
    *("pretrained_model_name_or_path", "revision", "variant", "seed", "reward", "resolution"),
    *("sample_num_steps", "guidance", "sample_guidance_scale"),
    *("variance", "variance_options", "sample_eta", "sample_etas"),
)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation images in the order of their prompts, the same on every process."""

    pixels: Pixels
    rewards: Scores

    def summary(self) -> dict[str, float]:
        return {
            "reward": self.rewards.mean().item(),
            "deviation": self.rewards.std(correction=0).item(),
            "images": len(self.rewards),
        }


class Validator:
    """Draws and records the validation images of the policy.

    Attributes:
        base: images of the base model, to show beside those of the policy in trackers.
        settings: what the images and their rewards depend on, besides the policy.
    """

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup, self.progress = setup, progress
        self.prompts = validation_prompts(setup.settings, setup.prompts)
        self.settings = {name: getattr(setup.settings, name) for name in DRAWN_BY}
        self.settings |= {"mixed_precision": setup.accelerator.mixed_precision, "prompts": self.prompts}
        self.base: Validation | None = None
        self._drawn: tuple[int, Validation] | None = None

    def current(self) -> Validation:
        """The images of the policy at this step, which are drawn once."""
        if self._drawn is None or self._drawn[0] != self.progress.step:
            self._drawn = (self.progress.step, self._draw(self.prompts))
        return self._drawn[1]

    def draw_base(self) -> None:
        """Draw the base model's images for trackers; before training, they are those of the policy."""
        drawn = self._draw(self.prompts[:SHOWN], base=True) if self.progress.step else self.current()
        self.base = Validation(pixels=drawn.pixels[:SHOWN].clone(), rewards=drawn.rewards[:SHOWN].clone())

    def save(self) -> None:
        """Save the images of the policy as a picture, and log them and their reward."""
        setup, step, validation = self.setup, self.progress.step, self.current()
        if setup.accelerator.is_main_process:
            labels = [f"{p}\nreward {r:.4g}" for p, r in zip(self.prompts, validation.rewards, strict=True)]
            file = setup.output / "samples" / f"step-{step:06d}.png"
            file.parent.mkdir(exist_ok=True)
            captioned_grid([to_image(pixels) for pixels in validation.pixels], labels).save(file)
            log_images(setup.accelerator.trackers, step, *captioned(self.prompts, validation, self.base))
        setup.accelerator.log({"validation_reward": validation.summary()["reward"]}, step=step)

    def record(self, moment: str) -> None:
        """Save the images, and keep their mean reward and their rewards, `before` or `after` training."""
        self.save()
        self.progress.validation[moment] = self.current().summary()
        self.keep_rewards(moment)

    def keep_rewards(self, moment: str) -> None:
        """Keep the rewards of the images `before` training, of the `best` checkpoint, or `after` training.

        None are kept if the images cannot be compared with those before, as in a run that resumes with another seed.
        """
        progress = self.progress
        if moment == "before":
            progress.validation_prompts, progress.validation_settings = self.prompts, self.settings
        if self.prompts == progress.validation_prompts and self.is_comparable(progress.validation_settings):
            progress.validation_rewards[moment] = self.current().rewards.tolist()
        else:
            progress.validation_rewards.pop(moment, None)

    def is_comparable(self, earlier: Mapping[str, Any]) -> bool:
        """Whether images drawn with these settings, of which earlier versions recorded fewer, differ by policy only."""
        return all(self.settings[name] == value for name, value in earlier.items())

    @torch.no_grad()
    def _draw(self, prompts: list[str], *, base: bool = False) -> Validation:
        setup = self.setup
        drawn = draw_together(setup, "validation", prompts, base=base)
        scored = [(images, setup.reward.reward(images, batch)) for batch, images in drawn]
        pixels, rewards = (gathered(setup.accelerator, share, len(prompts)) for share in zip(*scored, strict=True))
        return Validation(pixels=pixels, rewards=rewards)


def captioned(
    prompts: Sequence[str], validation: Validation, base: Validation | None
) -> tuple[list[Image.Image], list[str]]:
    """The first images, to the right of the base model's if there are any, and captions with prompt and reward."""
    images, captions = [], []
    factor = enlargement(to_image(validation.pixels[0]), CELL)
    for i, prompt in enumerate(prompts[:SHOWN]):
        pixels, rewards = validation.pixels[i], f"reward {validation.rewards[i]:.4g}"
        if base is not None:
            pixels = torch.cat([base.pixels[i], pixels], dim=-1)
            rewards = f"base, left: {base.rewards[i]:.4g}; right: {validation.rewards[i]:.4g}"
        images.append(enlarge(to_image(pixels), factor))
        captions.append(f"{prompt}\n{rewards}")
    return images, captions


def validation_prompts(settings: TrainSettings, training: Sequence[str]) -> list[str]:
    """The prompts of the validation images: those of the settings or of a set, or some of the training prompts."""
    wanted = [printable(text) for text in settings.validation_prompts] or training  # they may be arguments
    if settings.validation_set:
        wanted = load_prompts(settings.validation_set)
    count = settings.num_validation_images
    return [wanted[i * len(wanted) // count if count < len(wanted) else i % len(wanted)] for i in range(count)]


@torch.no_grad()
def draw_together(
    setup: Setup, key: str, prompts: Sequence[str], *, base: bool = False
) -> Iterator[tuple[list[str], Pixels]]:
    """This process's share of images of the policy, or of the base model, by micro-batch: prompts and pixels.

    The noise of an image depends on the key and the index of its prompt. Every process has as many batches as any
    other, since with ZeRO-3 all take part in each forward pass; if prompts do not divide, the last processes draw some
    of the first again.
    """
    sampling = replace(setup.sampling, adapter=None) if base else setup.current_sampling()
    sampling = replace(sampling, learned=frozenset())
    each = -(-len(prompts) // setup.accelerator.num_processes)
    first = setup.accelerator.process_index * each
    for start in range(first, first + each, setup.settings.train_batch_size):
        end = min(start + setup.settings.train_batch_size, first + each)
        indices = [index % len(prompts) for index in range(start, end)]
        batch = [prompts[index] for index in indices]
        generators = [sample_generator(setup.settings.seed, key, index) for index in indices]
        with setup.accelerator.autocast():
            latents = rollout(sampling, setup.embed(batch), generators).latents
        check_latents(latents, batch)
        yield batch, decode_finite(setup.backbone, latents, batch)


def gathered(accelerator: Accelerator, share: Sequence[Tensor], count: int) -> Tensor:
    """The batches of all processes as one, in order, without what was drawn twice; on the CPU."""
    return accelerator.gather(torch.cat(list(share)).contiguous())[:count].cpu()


def fit_reward(setup: Setup, progress: Progress) -> None:
    """Fit the reward on images of the base if the settings ask for it and it has not been fitted; on all processes."""
    count = setup.settings.fit_reward
    if count and not progress.reward:
        if progress.step:
            raise ValueError("fit_reward on a run that has begun without; its policy is no longer the base")
        prompts = [setup.prompts[i * len(setup.prompts) // count] for i in range(count)]
        shares = draw_together(setup, "fit", prompts)
        columns = [setup.reward.reward.terms_of(pixels, batch) for batch, pixels in shares]
        progress.reward = setup.reward.fit(gathered(setup.accelerator, columns, count))
    if progress.reward:
        setup.reward.restore(progress.reward)
