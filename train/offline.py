"""Preference pairs of a data set instead of rollouts: Diffusion-DPO (arXiv:2311.12908)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Real
from PIL import Image, ImageOps
from torch import Tensor, nn

from stepfuse.data.data_set import has_picture, open_data_set, read_caption, read_label, read_picture, reason
from stepfuse.data.images import to_pixels
from stepfuse.data.text_files import file_name, note
from stepfuse.fuse.backbones.conditioning import Conditioning
from stepfuse.fuse.backbones.denoiser import Denoiser
from stepfuse.fuse.backbones.guidance import Latents
from stepfuse.fuse.diffusion.gaussian import Gaussian
from stepfuse.fuse.lora.mixture import BASE
from stepfuse.train.algorithm import Algorithm, Batch, StepGaussians, preference_loss
from stepfuse.train.checkpoints import Progress
from stepfuse.train.health import Health
from stepfuse.train.rollout import Sampling, Trajectory, sample_generator
from stepfuse.train.settings import DPOSettings
from stepfuse.train.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images for one prompt, as they are in the data set.

    Attributes:
        winner, loser: the values of the columns of the preferred image and of the other.
        winner_column, loser_column: names of these columns.
        folder: folder that paths of images are relative to.
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
    dropped. A row without its caption, label or one of its images is skipped, with a message the first time, and with
    their number at the end of the first pass. Of a list of captions one is drawn. Images are decoded by `Pair.picture`.

    Args:
        source: a hub data set, a parquet file, or a folder of parquet files, or of images with a metadata file.

    Raises:
        ValueError: for a source that does not exist, lacks a column, or contains no pair.
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
        """The pairs from an index on; those before it are read and skipped."""
        epoch, index = 0, 0
        while True:
            self.rows.set_epoch(epoch)
            before, lacking = index, Counter[str]()
            for row in self._read():
                pair = self._pair(row, index)
                if isinstance(pair, Pair):
                    if index >= start:
                        yield pair
                    index += 1
                elif pair is not None:
                    if epoch == 0 and not lacking:
                        note(f"{self.name}: a row without a value in column {pair!r} is passed over, as others are")
                    lacking[pair] += 1
            counted = ", ".join(f"{count} rows without a value in column {name!r}" for name, count in lacking.items())
            if index == before:
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
        except Exception as error:  # readers of data sets raise errors of many kinds for damaged files
            raise ValueError(f"{self.name} cannot be read: {reason(error)}") from error

    def _pair(self, row: dict[str, Any], index: int) -> Pair | str | None:
        """The pair of a row, None for a tie, or the name of the column without a value."""
        first, second, label, caption = self.columns
        column = label
        try:
            preferred = read_label(row[label])
            column = caption
            prompt = read_caption(row[caption], draw=f"{self.settings.seed} {index}")
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
            prompt=prompt, winner=row[one], loser=row[other], winner_column=one, loser_column=other, folder=self.folder
        )


@dataclass(frozen=True, kw_only=True)
class NoisedPairs:
    """Images of a data set at one noise level each, the winners of all pairs before their losers.

    Attributes:
        x_t: the noised latents.
        times: t of each image.
        target: what a network that knew the image would predict.
        reference: what the base predicts.
    """

    x_t: Latents
    times: Real[Tensor, " batch"]
    target: Latents
    reference: Latents


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Noised pairs, of which every process decodes its share."""

    setup: Setup
    pairs: Iterator[Pair]

    @torch.no_grad()
    def collect(self, step: int) -> tuple[list[Batch[NoisedPairs]], dict[str, float]]:
        """This process's micro-batches of one step; every process reads all pairs."""
        setup, denoiser = self.setup, self.setup.sampling.denoiser
        all_pairs = list(islice(self.pairs, setup.total_batch_size))
        batches = []
        for rows in setup.micro_batches():
            pairs = [all_pairs[i] for i in rows]
            generators = [sample_generator(setup.settings.seed, "pairs", step, i) for i in rows]
            winner, loser = (self._latents(pairs, side, generators) for side in ("winner", "loser"))
            # one noise and one time per pair, so that winner and loser differ by the image alone
            noise = torch.stack([torch.randn(winner.shape[1:], generator=g) for g in generators]).to(winner)
            times = torch.cat([denoiser.path.draw(g) for g in generators])
            prompts = [pair.prompt for pair in pairs]
            with setup.accelerator.autocast():
                conditioning = setup.embed(prompts)
                noised = noise_pairs(denoiser, winner, loser, noise, times, conditioning)
            trajectory = Trajectory(steps=(noised,), latents=winner, conditioning=conditioning)
            batches.append(Batch(prompts=prompts, trajectory=trajectory))
        return batches, {}

    def _latents(self, pairs: Sequence[Pair], side: str, generators: list[torch.Generator]) -> Latents:
        """One image of each pair, scaled to the base's size by the shorter side, cropped in the centre and encoded."""
        backbone, resolution = self.setup.backbone, self.setup.settings.resolution
        height, width = backbone.size(resolution, resolution)
        opened = [pair.picture(side) for pair in pairs]
        fitted = [ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR) for image in opened]
        return backbone.encode_pixels(torch.stack([to_pixels(image) for image in fitted]), generators)


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
        winner, loser: clean latents.
        noise: e, one per pair.
        times: t, one per pair.
    """
    path = denoiser.path
    clean, e, t = torch.cat([winner, loser]), torch.cat([noise, noise]), torch.cat([times, times])
    x_t = path.noised(clean, e, t)
    (reference,) = denoiser.forward(x_t, t, twice(conditioning), "+", BASE)
    return NoisedPairs(x_t=x_t, times=t, target=path.target(clean, e, t), reference=reference)


def twice(conditioning: Conditioning) -> Conditioning:
    """The conditioning of winners and losers, from that of the pairs."""
    return conditioning[torch.arange(len(conditioning)).repeat(2)]


@dataclass(frozen=True)
class DiffusionDPO(Algorithm[NoisedPairs]):
    """Diffusion-DPO on noised pairs: each prediction is the mean of a Gaussian of variance 1.

        log p(target) = -|target - prediction|² / 2,    L = dpo_loss of winner and loser

    With `log_prob_reduction: mean` that is, for mean squared errors l,

        L = -log sigmoid(-beta/2 [(l_winner - l_winner,ref) - (l_loser - l_loser,ref)])

    as in the code of arXiv:2311.12908 and in diffusers' script for SDXL; the script for SD 1.5 leaves out the 1/2, so
    its beta_dpo is half of this beta.
    """

    settings: DPOSettings
    name: ClassVar[str] = "diffusion-dpo"

    @property
    def measures_kl(self) -> bool:
        return False

    def source(self, setup: Setup, progress: Progress, health: Health) -> PairSource:
        pairs = PreferencePairs(self.settings.pairs, self.settings)
        return PairSource(setup=setup, pairs=pairs(progress.step * setup.total_batch_size))

    def gaussians(
        self, policy: nn.Module, sampling: Sampling, steps: Sequence[NoisedPairs], conditioning: Conditioning
    ) -> Sequence[StepGaussians]:
        """Policy and base of the one step of a batch, without guidance, as in pre-training."""
        (step,) = steps
        times = sampling.denoiser.path.network_time(step.times).to(step.x_t.device)
        output, _ = policy(step.x_t, times, **twice(conditioning).inputs("+"))
        variance = step.x_t.new_ones(1, 1, 1, 1)
        means = (output.to(torch.float32), step.reference)
        ours, reference = (Gaussian(mean=mean, variance=variance) for mean in means)
        return [(ours, reference)]

    def loss(self, policy: Gaussian, reference: Gaussian | None, step: NoisedPairs) -> Float[Tensor, " pairs"]:
        """One value per pair."""
        assert reference is not None  # every pair has one
        scale = self.log_prob_scale(step.x_t)
        log_probs = [part for p in (policy, reference) for part in (p.log_prob(step.target) * scale).chunk(2)]
        return preference_loss(self.settings, *log_probs)
