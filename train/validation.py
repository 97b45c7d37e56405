"""The validation images of a run: drawn by all processes together, scored, saved and compared."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from stepfuse.data.grid import captioned_grid
from stepfuse.data.images import to_image
from stepfuse.data.prompts import load_prompts
from stepfuse.data.stages import stage
from stepfuse.data.text_files import printable
from stepfuse.fuse.sampling.finite import check_latents, decode_finite
from stepfuse.rewards.protocol import Pixels
from stepfuse.train.checkpoints import Progress
from stepfuse.train.rollout import rollout, sample_generator
from stepfuse.train.settings import TrainSettings
from stepfuse.train.setup import ModelSetup, Setup
from stepfuse.train.trackers import log_images
from stepfuse.train.validation_points import SHOWN, Validation, captioned, label_rewards, validation_points

DRAWN_BY = (
    *("pretrained_model_name_or_path", "revision", "variant", "seed", "reward", "reward_dtype", "resolution"),
    *("sample_num_steps", "guidance", "sample_guidance_scale"),
    *("variance", "variance_options", "sample_eta", "sample_etas"),
)


class Validator:
    """Draws and records the validation images of the policy.

    Attributes:
        base: images of the base model, to show beside those of the policy in trackers.
        settings: what the images and their rewards depend on, besides the policy.
    """

    def __init__(self, setup: Setup, progress: Progress) -> None:
        self.setup, self.progress = setup, progress
        self.points = validation_points(setup.reward.names)
        self.prompts = validation_prompts(setup.settings, setup.prompts)
        self.settings = {name: getattr(setup.settings, name) for name in DRAWN_BY}
        if setup.settings.objectives:
            self.settings |= {name: getattr(setup.settings, name) for name in ("objectives", "train_rule")}
        self.settings |= {"mixed_precision": setup.accelerator.mixed_precision, "prompts": self.prompts}
        self.base: Validation | None = None
        self._drawn: tuple[int, Validation] | None = None

    def current(self) -> Validation:
        """The images of the policy at this step, which are drawn once."""
        if self._drawn is None or self._drawn[0] != self.progress.step:
            self._drawn = (self.progress.step, self._draw(self.prompts))
        return self._drawn[1]

    def summary(self) -> dict[str, Any]:
        """The summary of the current images."""
        return self.current().summary(self.progress.validation.get("before", {}))

    def draw_base(self) -> None:
        """Draw the base model's images for trackers; before training, they are those of the policy."""
        drawn = self._draw(self.prompts[:SHOWN], base=True) if self.progress.step else self.current()
        self.base = replace(drawn, pixels=drawn.pixels[:, :SHOWN].clone(), rewards=drawn.rewards[:, :SHOWN].clone())

    def save(self) -> None:
        """Save the images of the policy as a picture for each point, and log them and their reward."""
        setup, step, validation = self.setup, self.progress.step, self.current()
        for index, point in enumerate(self.points if setup.accelerator.is_main_process else []):
            pixels, rewards = validation.pixels[index], validation.rewards[index]
            labels = [f"{p}\n{label_rewards(self.points, r)}" for p, r in zip(self.prompts, rewards, strict=True)]
            several = f"-{point.name}" if len(self.points) > 1 else ""
            file = setup.output / "samples" / f"step-{step:06d}{several}.png"
            file.parent.mkdir(exist_ok=True)
            captioned_grid([to_image(each) for each in pixels], labels).save(file)
            shown = captioned(self.prompts, validation, self.base, index)
            log_images(setup.accelerator.trackers, step, *shown, name=point.name if several else "")
        summary = self.summary()
        values = {"validation_reward": summary["reward"]}
        for point, of in summary.get("points", {}).items():
            values |= {f"validation/{point}/{name}": figures["reward"] for name, figures in of.items()}
        setup.accelerator.log(values, step=step)

    def record(self, moment: str) -> None:
        """Save the images, and keep their mean reward and their rewards, `before` or `after` training."""
        self.save()
        self.progress.validation[moment] = self.summary()
        self.keep_rewards(moment)

    def keep_rewards(self, moment: str) -> None:
        """Keep the rewards of the images `before` training, of the `best` checkpoint, or `after` training.

        None are kept if the images cannot be compared with those before, as in a run that resumes with another seed.
        """
        progress = self.progress
        if moment == "before":
            progress.validation_prompts, progress.validation_settings = self.prompts, self.settings
        if self.prompts == progress.validation_prompts and self.is_comparable(progress.validation_settings):
            progress.validation_rewards[moment] = self.current().as_lists()
        else:
            progress.validation_rewards.pop(moment, None)

    def is_comparable(self, earlier: Mapping[str, Any]) -> bool:
        """Whether images drawn with these settings, of which earlier versions recorded fewer, differ by policy only."""
        return all(self.settings[name] == value for name, value in earlier.items())

    @torch.no_grad()
    def _draw(self, prompts: list[str], *, base: bool = False) -> Validation:
        setup, accelerator = self.setup, self.setup.accelerator
        pixels, rewards = [], []
        for point in self.points[:1] if base else self.points:
            drawn = draw_together(setup, "validation", prompts, weights=None if base else point.weights)
            scored = ((images, setup.reward.unshaped(images, batch)) for batch, images in drawn)
            shown, values = gathered(accelerator, scored, len(prompts))
            pixels.append(shown)
            rewards.append(values)
        copies = len(self.points) // len(pixels)  # the base has no weights
        return Validation(
            points=self.points, pixels=torch.stack(pixels * copies), rewards=torch.stack(rewards * copies)
        )


def validation_prompts(settings: TrainSettings, training: Sequence[str]) -> list[str]:
    """The prompts of the validation images: those of the settings or of a set, or some of the training prompts."""
    wanted = [printable(text) for text in settings.validation_prompts] or training  # they may be arguments
    if settings.validation_set:
        wanted = load_prompts(settings.validation_set)
    count = settings.num_validation_images
    return [wanted[i * len(wanted) // count if count < len(wanted) else i % len(wanted)] for i in range(count)]


@torch.no_grad()
def draw_together(
    setup: Setup, key: str, prompts: Sequence[str], *, weights: Sequence[float] | None
) -> Iterator[tuple[list[str], Pixels]]:
    """This process's share of images by micro-batch: prompts and pixels.

    Args:
        key: see `shared_batches`.
        weights: of the objectives in the policy; None for the base model.
    """
    sampling = setup.sampling.of_base() if weights is None else setup.current_sampling()
    sampling = replace(sampling, learned=frozenset())
    row = torch.tensor([weights or (1.0,)], dtype=torch.float64)
    for batch, generators in shared_batches(setup, key, prompts):
        conditioning = setup.embed(batch)
        # As in the rollouts that are trained on, whose graphs a compiled network then uses here too.
        with setup.accelerator.autocast(), torch.inference_mode(not setup.engine.partitioned):
            latents = rollout(sampling, conditioning, generators, row.expand(len(batch), -1)).latents
        latents = latents.clone()  # no longer bound to inference
        check_latents(latents, batch)
        yield batch, decode_finite(setup.backbone, latents, batch)


def shared_batches(
    setup: ModelSetup, key: str, prompts: Sequence[str]
) -> Iterator[tuple[list[str], list[torch.Generator]]]:
    """This process's share of the prompts by micro-batch, with a generator for the image of each.

    The noise of an image depends on the key and the index of its prompt. Every process has as many batches as any
    other, since with ZeRO-3 all take part in each forward pass; if prompts do not divide, the last processes draw some
    of the first again.
    """
    each = -(-len(prompts) // setup.accelerator.num_processes)
    first = setup.accelerator.process_index * each
    for start in range(first, first + each, setup.settings.train_batch_size):
        end = min(start + setup.settings.train_batch_size, first + each)
        indices = [index % len(prompts) for index in range(start, end)]
        generators = [sample_generator(setup.settings.seed, key, index) for index in indices]
        yield [prompts[index] for index in indices], generators


def gathered(accelerator: Accelerator, share: Iterable[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Columns of tensors of all processes in order, without what was drawn twice; on the CPU.

    Args:
        share: this process's tensors by micro-batch, one for each column. Each batch goes to the CPU before the next is
            asked for, so that a GPU need not hold all images.
        count: number of rows of all processes.
    """
    batches = [[_of_all_processes(accelerator, each) for each in batch] for batch in share]
    return [torch.cat(column, dim=1).flatten(0, 1)[:count] for column in zip(*batches, strict=True)]


def _of_all_processes(accelerator: Accelerator, rows: Tensor) -> Tensor:
    """The rows of each process, as (processes, rows, …) on the CPU."""
    return accelerator.gather(rows.contiguous()).cpu().unflatten(0, (accelerator.num_processes, -1))


def fit_reward(setup: Setup, progress: Progress) -> None:
    """Fit the rewards on images of the base if the settings ask for it and they have not been; on all processes."""
    count, objectives = setup.settings.fit_reward, setup.reward.objectives
    if count and not progress.reward:
        if progress.step:
            raise ValueError("fit_reward on a run that has begun without; its policy is no longer the base")
        prompts = [setup.prompts[i * len(setup.prompts) // count] for i in range(count)]
        stage(f"Generating {count} images, to fit the rewards' mean and standard deviation …")
        # Before training the policy is the base, with all weights.
        drawn = draw_together(setup, "fit", prompts, weights=setup.sampling.equal_weights(1)[0].tolist())
        terms = ([objective.reward.terms_of(pixels, batch) for objective in objectives] for batch, pixels in drawn)
        columns = gathered(setup.accelerator, terms, count)
        fitted = [objective.fit(column) for objective, column in zip(objectives, columns, strict=True)]
        progress.reward = fitted[0] if len(fitted) == 1 else {"objectives": fitted}
    if progress.reward:
        for objective, known in zip(objectives, progress.reward.get("objectives", [progress.reward]), strict=True):
            objective.restore(known)
