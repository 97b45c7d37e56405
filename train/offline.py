"""Preference pairs of a data set instead of rollouts: Diffusion-DPO (arXiv:2311.12908)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from torch import Tensor

from stepfuse.data.data_set import has_picture, open_data_set, read_caption, read_label, read_picture, reason
from stepfuse.data.images import to_pixels
from stepfuse.data.text_files import file_name, note
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser, Latents
from stepfuse.fuse.backbones.unet import encode_pixels, image_size
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.diffusion.variance import VarianceSchedule
from stepfuse.train.collect import Batch
from stepfuse.train.conditioning import Embeddings
from stepfuse.train.losses import dpo_loss
from stepfuse.train.rollout import NoisedPairs, Trajectory, sample_generator
from stepfuse.train.settings import DPOSettings


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images for one prompt, as they are in the data set.

    Attributes:
        winner, loser: the preferred one and the other; what a column holds.
        winner_column, loser_column: those columns.
        folder: what paths of images are relative to.
    """

    prompt: str
    winner: Any
    loser: Any
    winner_column: str
    loser_column: str
    folder: Path

    def picture(self, side: str) -> Image.Image:
        """The winner or the loser, upright and in RGB.

        Raises:
            ValueError: for an image that is missing or cannot be read, naming its column and the prompt.
        """
        column = getattr(self, f"{side}_column")
        return read_picture(
            getattr(self, side), self.folder, f"the image for the prompt {self.prompt!r} in column {column!r}"
        )


class PreferencePairs:
    """The pairs of a Pick-a-Pic-shaped data set, streamed, shuffled within a buffer, over and over.

    `label_0` is 1 where the first image is preferred and 0 where the second is. Other values are ties, which are
    dropped. A row that lacks its caption, label or one of its images is passed over, and a line says so: the first
    time, and how many there are at the end of the first pass. Of a list of captions one is drawn. Images are decoded by
    `Pair.picture`.

    Args:
        source: a hub data set, a parquet file, or a folder of either parquet files or images with a metadata file.

    Raises:
        ValueError: for a source that is not there, a column that it lacks, or no pair in it.
    """

    def __init__(self, source: str, settings: DPOSettings) -> None:
        from datasets import Image as ImageFeature

        self.source, self.settings = source, settings
        self.folder = Path(source) if Path(source).is_dir() else Path(source).parent
        self.name = f"preference pairs {file_name(source)!r}"
        self.columns = (*settings.image_columns, settings.label_column, settings.caption_column)
        rows = open_data_set(source, settings.dataset_split, streaming=True)
        try:
            known = rows.column_names or list(next(iter(rows)))
        except Exception as error:
            why = "it is empty" if isinstance(error, StopIteration) else reason(error)
            raise ValueError(f"cannot load {self.name}: {why}") from error
        for column in self.columns:
            if column not in known:
                raise ValueError(f"{self.name} have no column {column!r}; they have {', '.join(known)}")
        rows = rows.select_columns(list(self.columns))
        for name in settings.image_columns:
            if rows.features and isinstance(rows.features[name], ImageFeature):
                rows = rows.cast_column(name, ImageFeature(decode=False))
        self.rows = rows.shuffle(seed=settings.seed, buffer_size=settings.pairs_shuffle_buffer)

    def __call__(self, start: int) -> Iterator[Pair]:
        """From a place on; pairs before it are read and passed over."""
        epoch, place = 0, 0
        while True:
            self.rows.set_epoch(epoch)
            before, lacking = place, Counter[str]()
            for row in self._read():
                pair = self._pair(row, place)
                if isinstance(pair, Pair):
                    if place >= start:
                        yield pair
                    place += 1
                elif pair is not None:
                    if epoch == 0 and not lacking:
                        note(f"{self.name}: a row without a value in column {pair!r} is passed over, as others are")
                    lacking[pair] += 1
            counted = ", ".join(f"{count} rows without a value in column {name!r}" for name, count in lacking.items())
            if place == before:
                raise ValueError(
                    f"{self.name} hold no pair whose {self.settings.label_column} is 0 or 1"
                    + (f" besides {counted}" if counted else "")
                )
            if epoch == 0 and counted:
                note(f"{self.name}: {counted} passed over")
            epoch += 1

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.rows
        except Exception as error:  # of damaged files, the readers of data sets raise errors of many kinds
            raise ValueError(f"{self.name} cannot be read: {reason(error)}") from error

    def _pair(self, row: dict[str, Any], place: int) -> Pair | str | None:
        """The pair of a row, None for a tie, or the column that the row lacks a value of."""
        first, second, label, caption = self.columns
        column = label
        try:
            preferred = read_label(row[label])
            column = caption
            prompt = read_caption(row[caption], draw=f"{self.settings.seed} {place}")
        except ValueError as error:
            raise ValueError(f"{self.name}: a row {error} in column {column!r}") from error
        if preferred is None or prompt is None:
            return label if preferred is None else caption
        for name in (first, second):
            if not has_picture(row[name]):
                return name
        if preferred not in (0, 1):
            return None
        one, other = (first, second) if preferred == 1 else (second, first)
        return Pair(
            prompt=prompt,
            winner=row[one],
            loser=row[other],
            winner_column=one,
            loser_column=other,
            folder=self.folder,
        )


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """What the loop learns from: noised pairs, shared out over the processes."""

    settings: DPOSettings
    accelerator: Accelerator
    pipeline: DiffusionPipeline
    denoiser: Denoiser
    embed: Embeddings
    pairs: Iterator[Pair]

    @torch.no_grad()
    def collect(self, step: int, schedule: VarianceSchedule) -> tuple[list[Batch], dict[str, float]]:
        """This process's micro-batches of one step; every process reads all pairs and decodes its own."""
        settings = self.settings
        size = settings.train_batch_size
        own = size * settings.gradient_accumulation_steps
        first = self.accelerator.process_index * own
        everyone = list(islice(self.pairs, own * self.accelerator.num_processes))
        batches = []
        for start in range(first, first + own, size):
            rows = range(start, start + size)
            pairs = [everyone[i] for i in rows]
            generators = [sample_generator(settings.seed, "pairs", step, i) for i in rows]
            winner, loser = (self._latents(pairs, side, generators) for side in ("winner", "loser"))
            # one noise and one time a pair: what differs between winner and loser is the image alone
            noise = torch.stack([torch.randn(winner.shape[1:], generator=g) for g in generators]).to(winner)
            times = torch.cat([torch.randint(self.denoiser.path.length, (1,), generator=g) for g in generators])
            prompts = [pair.prompt for pair in pairs]
            with self.accelerator.autocast():
                noised = noise_pairs(self.denoiser, winner, loser, noise, times, self.embed(prompts))
            trajectory = Trajectory(steps=(noised,), latents=winner, conditioning=self.embed(prompts))
            batches.append(Batch(prompts=prompts, trajectory=trajectory))
        return batches, {}

    def _latents(self, pairs: Sequence[Pair], side: str, generators: list[torch.Generator]) -> Latents:
        """One image of each pair, scaled to the base's size by the shorter side, cropped in the centre and encoded."""
        height, width = image_size(self.pipeline, self.settings.resolution, self.settings.resolution)
        opened = [pair.picture(side) for pair in pairs]
        fitted = [ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR) for image in opened]
        return encode_pixels(self.pipeline, torch.stack([to_pixels(image) for image in fitted]), generators)


@torch.no_grad()
def noise_pairs(
    denoiser: Denoiser,
    winner: Latents,
    loser: Latents,
    noise: Latents,
    times: Int[Tensor, " batch"],
    conditioning: Conditioning,
) -> NoisedPairs:
    """x_t = alpha_t x_0 + sigma_t e of both images of each pair, and what the base predicts there.

    Args:
        winner, loser: clean latents.
        noise: e, one a pair.
        times: t, one a pair.
    """
    path = denoiser.path
    clean, e, t = torch.cat([winner, loser]), torch.cat([noise, noise]), torch.cat([times, times])
    x_t = path.noised(clean, e, t)
    both = conditioning[torch.arange(len(noise)).repeat(2)]
    (reference,) = denoiser.forward(x_t, t, both, "+", None)
    return NoisedPairs(x_t=x_t, times=t, target=path.target(clean, e, t), reference=reference)


@dataclass(frozen=True)
class DiffusionDPO:
    """Diffusion-DPO on noised pairs: each prediction is taken for a Gaussian of variance 1 about it.

        log p(target) = -|target - prediction|² / 2,    L = dpo_loss of winner and loser

    With `log_prob_reduction: mean` that is, of mean squared errors l,

        L = -log sigmoid(-beta/2 [(l_winner - l_winner,ref) - (l_loser - l_loser,ref)])

    as the code of arXiv:2311.12908 and diffusers' script for SDXL have it; the script for SD 1.5 leaves the 1/2 out, so
    its beta_dpo is half of this beta.
    """

    settings: DPOSettings
    name: str = "diffusion-dpo"
    group_size: int = 1
    updates_per_rollout: int = 1
    beta: float = 0.0
    measures_kl: bool = False

    def temperature(self, dimensions: int) -> float:
        """Of the loss on noise predictions; the temperature of denoising steps is not known."""
        return self.settings.beta / (dimensions if self.settings.log_prob_reduction == "mean" else 1)

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: NoisedPairs) -> Float[Tensor, " batch"]:
        """One value a pair."""
        assert reference is not None
        scale = 1 / step.x_t[0].numel() if self.settings.log_prob_reduction == "mean" else 1.0
        chosen, rejected = (policy.log_prob(step.target) * scale).chunk(2)
        reference_chosen, reference_rejected = (reference.log_prob(step.target) * scale).chunk(2)
        return dpo_loss(
            chosen,
            rejected,
            reference_chosen,
            reference_rejected,
            beta=self.settings.beta,
            label_smoothing=self.settings.label_smoothing,
            loss_type=self.settings.loss_type,
        )
