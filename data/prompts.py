"""Prompts from a text file, a data set of the hub, or a named prompt set."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from stepfuse.data import colours, emoji, quoted_words
from stepfuse.data.data_set import open_data_set, read_caption, reason
from stepfuse.data.names import nearest
from stepfuse.data.text_files import file_name, note, read_lines


def load_prompts(
    source: str, *, dataset_name: str | None = None, split: str = "train", column: str = "caption", seed: int = 0
) -> list[str]:
    """Load a list of prompts, in the order of their source.

    Args:
        source: A UTF-8 text file with one prompt per line, in which empty lines are skipped, or a name in
            `PROMPT_SETS`, such as `emoji` (the captions that the bundled base is trained on) and `emoji-heldout` (its
            held-out captions). With `:COUNT` appended, COUNT evenly spaced prompts: `emoji-heldout:64`.
        dataset_name: A data set of the hub, a folder or a file, used instead of `source`. If a row has a list of
            captions, one of them is drawn. Rows without a caption are skipped, and their number is printed.
        split: Split of the data set.
        column: Column of the data set that holds the captions.
        seed: Seed of the draw among several captions.

    Raises:
        ValueError: If the source is missing or is not UTF-8 text, has no prompts or fewer than COUNT, if COUNT is not
            a positive integer, if the column does not hold strings, or if the hub cannot be reached.
    """
    if dataset_name:
        return _from_dataset(dataset_name, split, column, seed=seed)
    name, count = parse_prompts(source)
    if name in PROMPT_SETS:
        prompts = PROMPT_SETS[name]()
    else:
        prompts = [line.strip() for line in read_lines(Path(name)) if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {file_name(name)!r} is empty; expected one prompt per line")
    if count is None:
        return prompts
    if count > len(prompts):
        raise ValueError(
            f"prompts {source!r}: the count is {count}; expected at most {len(prompts)}, the size of {name}"
        )
    return [prompts[k * len(prompts) // count] for k in range(count)]


def parse_prompts(source: str) -> tuple[str, int | None]:
    """Split a source of prompts into the file or the name of the prompt set, and COUNT if `:COUNT` is appended.

    Errors are those of `load_prompts` that are known without reading the prompts.
    """
    if _exists(source):
        return source, None
    if Path(source).is_dir():
        raise ValueError(f"prompts {file_name(source)!r} is a folder; expected a text file with one prompt per line")
    name, colon, count = source.rpartition(":")
    if not _exists(name):
        unknown = name if colon else source
        raise ValueError(
            f"no prompts {file_name(unknown)!r}; expected a text file with one prompt per line, or one of "
            f"{', '.join(PROMPT_SETS)}{nearest(unknown, PROMPT_SETS)}"
        )
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"prompts {source!r}: the count is {count!r}; expected a positive integer")
    return name, int(count)


def _exists(source: str) -> bool:
    return source in PROMPT_SETS or Path(source).is_file()


def _from_dataset(
    name: str,
    split: str,
    column: str,
    *,
    streaming: bool = False,
    seed: int = 0,
    file: str | None = None,
    revision: str | None = None,
) -> list[str]:
    data_set = f"data set {file_name(name)!r}"
    rows = open_data_set(name, split, streaming=streaming, file=file, revision=revision)
    if column not in rows.column_names:
        names = rows.column_names
        raise ValueError(f"{data_set} has no column {column!r}; it has {', '.join(names)}{nearest(column, names)}")
    captions = []
    try:
        for index, row in enumerate(rows.select_columns([column])):  # other columns, such as images, are not decoded
            try:
                captions.append(read_caption(row[column], draw=f"{seed} {index}"))
            except ValueError as error:
                raise ValueError(f"{data_set}: row {index} {error} in column {column!r}") from error
    except OSError as error:  # the connection to the hub is lost
        raise ValueError(f"cannot load {data_set}: {reason(error)}") from error
    prompts = [caption for caption in captions if caption is not None]
    if not prompts:
        raise ValueError(f"{data_set} has no prompts in column {column!r}")
    if missing := len(captions) - len(prompts):
        note(f"{data_set}: {missing} of {len(captions)} rows have no text in column {column!r} and are skipped")
    return prompts


PROMPT_SETS: dict[str, Callable[[], list[str]]] = {
    "emoji": partial(emoji.captions, held_out=False),
    "emoji-heldout": partial(emoji.captions, held_out=True),
    "colours": partial(colours.colour_prompts, held_out=False),
    "colours-heldout": partial(colours.colour_prompts, held_out=True),
    "dpok": partial(list, colours.DPOK_PROMPTS),
    # Prompts with the text that the image shall show in double quotes.
    "quoted-words": partial(quoted_words.quoted_word_prompts, held_out=False),
    "quoted-words-heldout": partial(quoted_words.quoted_word_prompts, held_out=True),
    # 1,632 prompts, Apache-2.0.
    "partiprompts": partial(_from_dataset, "nateraw/parti-prompts", "train", "Prompt"),
    # The 58,960 unique prompts of Pick-a-Pic v2, without images (4 MB); used by Diffusion-DPO (arXiv:2311.12908).
    "pick-a-pic": partial(_from_dataset, "sayakpaul/pick-a-pic-v2-unique-prompts", "train", "prompt"),
    # Its 500 unique test prompts. Streaming downloads this split only: 150 kB instead of 290 MB.
    "pick-a-pic-heldout": partial(
        _from_dataset, "yuvalkirstain/pickapic_v2_no_images", "test_unique", "caption", streaming=True
    ),
    # The 600 short English prompts of UniGenBench++ (arXiv:2510.18701); CC BY 4.0, on the hub MIT. Files of other
    # languages have other columns.
    "unigenbench": partial(
        _from_dataset,
        "CodeGoat24/UniGenBench",
        "train",
        "prompt_en",
        file="eval/test_en.csv",
        revision="6ecbfa3820b38a15716e752b8cf6c219db6366a2",
    ),
}
