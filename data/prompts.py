"""Prompts from a file, a hub data set, or a set by its name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from stepfuse.data import colours, emoji
from stepfuse.data.data_set import open_data_set, read_caption, reason
from stepfuse.data.names import nearest
from stepfuse.data.text_files import file_name, note, read_lines


def load_prompts(
    source: str,
    *,
    dataset_name: str | None = None,
    split: str = "train",
    column: str = "caption",
    seed: int = 0,
) -> list[str]:
    """A list of prompts, in the order of their source.

    Args:
        source: a UTF-8 text file with a prompt a line, empty lines left out, or a name in `PROMPT_SETS`: `emoji` are
            the captions the embedded base was trained on, `emoji-heldout` those it never saw. Either with `:COUNT`
            behind it is that many of its prompts, evenly spaced: `emoji-heldout:64`.
        dataset_name: a hub data set, folder or file to take instead, by its split and column. Of a list of captions one
            is drawn; rows without a caption are passed over, and a line says how many.
        seed: of that draw.

    Raises:
        ValueError: for a source that is not there, is not UTF-8, holds no prompt, or fewer than COUNT, for a COUNT that
            is not a whole number of 1 or more, a column that holds no texts, and for a hub that is not reached.
    """
    if dataset_name:
        return _from_dataset(dataset_name, split, column, seed=seed)
    if _is_there(source):
        return _load(source)
    if Path(source).is_dir():
        raise ValueError(f"prompts {file_name(source)!r} is a folder; expected a text file with a prompt a line")
    name, colon, count = source.rpartition(":")
    if not _is_there(name):
        asked = name if colon else source
        raise ValueError(
            f"no prompts {file_name(asked)!r}; expected a text file with a prompt a line, or one of "
            f"{', '.join(PROMPT_SETS)}{nearest(asked, PROMPT_SETS)}"
        )
    if not count.isdecimal() or int(count) < 1:  # before the hub is asked
        raise ValueError(f"prompts {source!r}: the count is {count!r}; expected a whole number of 1 or more")
    prompts = _load(name)
    if int(count) > len(prompts):
        raise ValueError(f"prompts {source!r}: the count is {count}; {name} holds {len(prompts)}")
    return [prompts[k * len(prompts) // int(count)] for k in range(int(count))]


def _is_there(source: str) -> bool:
    return source in PROMPT_SETS or Path(source).is_file()


def _load(source: str) -> list[str]:
    if source in PROMPT_SETS:
        return PROMPT_SETS[source]()
    prompts = [line.strip() for line in read_lines(Path(source)) if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {file_name(source)!r} is empty; expected a prompt a line")
    return prompts


def _from_dataset(name: str, split: str, column: str, *, streaming: bool = False, seed: int = 0) -> list[str]:
    rows = open_data_set(name, split, streaming=streaming)
    if column not in rows.column_names:
        raise ValueError(
            f"data set {file_name(name)!r} has no column {column!r}; it has {', '.join(rows.column_names)}"
            f"{nearest(column, rows.column_names)}"
        )
    captions = []
    try:
        for index, row in enumerate(rows.select_columns([column])):  # so that no picture beside it is decoded
            try:
                captions.append(read_caption(row[column], draw=f"{seed} {index}"))
            except ValueError as error:
                raise ValueError(f"data set {file_name(name)!r}: row {index} {error} in column {column!r}") from error
    except OSError as error:  # the hub is no longer reached
        raise ValueError(f"cannot load data set {file_name(name)!r}: {reason(error)}") from error
    prompts = [caption for caption in captions if caption is not None]
    if not prompts:
        raise ValueError(f"data set {file_name(name)!r} has no prompts in column {column!r}")
    if len(prompts) < len(captions):
        note(
            f"data set {file_name(name)!r}: {len(captions) - len(prompts)} of {len(captions)} rows have no text in "
            f"column {column!r} and are passed over"
        )
    return prompts


PROMPT_SETS: dict[str, Callable[[], list[str]]] = {
    "emoji": partial(emoji.captions, held_out=False),
    "emoji-heldout": partial(emoji.captions, held_out=True),
    "colours": partial(colours.colour_prompts, held_out=False),
    "colours-heldout": partial(colours.colour_prompts, held_out=True),
    "dpok": partial(list, colours.DPOK_PROMPTS),
    # 1,632 prompts, Apache-2.0.
    "partiprompts": partial(_from_dataset, "nateraw/parti-prompts", "train", "Prompt"),
    # The 58,960 unique prompts that Diffusion-DPO (arXiv:2311.12908) trains on, of Pick-a-Pic v2: 4 MB, and no images.
    "pick-a-pic": partial(_from_dataset, "sayakpaul/pick-a-pic-v2-unique-prompts", "train", "prompt"),
    # Its 500 unique test prompts. Streamed: this split is 150 kB, and otherwise all come, 290 MB.
    "pick-a-pic-heldout": partial(
        _from_dataset, "yuvalkirstain/pickapic_v2_no_images", "test_unique", "caption", streaming=True
    ),
}
