"""Preference pairs of a data set: two images for one prompt, of which one is preferred."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from stepfuse.data.data_set import has_picture, open_data_set, read_caption, read_label, read_picture, reason
from stepfuse.data.text_files import file_name, note
from stepfuse.train.settings import DPOSettings


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images for one prompt.

    Attributes:
        winner, loser: read the preferred image and the other, upright and in RGB. For an image that is missing or
            cannot be read they raise ValueError, which names its column and the prompt.
    """

    prompt: str
    winner: Callable[[], Image.Image]
    loser: Callable[[], Image.Image]


class PreferencePairs:
    """The pairs of a Pick-a-Pic-shaped data set, streamed, shuffled within a buffer, over and over.

    The label is 1 where the first image is preferred and 0 where the second is; others are ties, which are dropped. A
    row that lacks a value is skipped, with a message the first time, and with their number after the first pass. Of a
    list of captions one is drawn.

    Args:
        source: a hub data set, a parquet file, or a folder of parquet files, or of images with a metadata file.

    Raises:
        ValueError: for a source that does not exist, lacks a column, or contains no pair.
    """

    def __init__(self, source: str, settings: DPOSettings) -> None:
        from datasets import Image as ImageFeature

        self.settings = settings
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
        index = 0
        for epoch in count():
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
            counted = ", ".join(f"{rows} rows without a value in column {name!r}" for name, rows in lacking.items())
            if index == before:
                raise ValueError(
                    f"{self.name} hold no pair whose {self.settings.label_column} is 0 or 1"
                    + (f" besides {counted}" if counted else "")
                )
            if epoch == 0 and counted:
                note(f"{self.name}: {counted} passed over")

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
        described = f"the image for the prompt {prompt!r} in column"
        winner, loser = (
            partial(read_picture, row[name], self.folder, f"{described} {name!r}") for name in (one, other)
        )
        return Pair(prompt=prompt, winner=winner, loser=loser)
