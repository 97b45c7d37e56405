"""Prompts from a file, a hub data set, or the emoji world."""

from pathlib import Path

from stepfuse.data import emoji


def load_prompts(
    source: str, *, dataset_name: str | None = None, split: str = "train", column: str = "caption"
) -> list[str]:
    """A list of prompts, in the order of their source.

    Args:
        source: a text file with a prompt a line; `emoji`, the captions the embedded base was trained on;
            or `emoji-heldout`, those it never saw.
        dataset_name: a hub data set or folder to take instead, by its split and column.

    Raises:
        ValueError: for a source that is not there, or holds no prompt.
    """
    if dataset_name:
        return _from_dataset(dataset_name, split, column)
    if source in ("emoji", "emoji-heldout"):
        return emoji.captions(held_out=source == "emoji-heldout")
    file = Path(source)
    if not file.is_file():
        raise ValueError(
            f"no prompt file {source!r}; expected a text file with a prompt a line, emoji or emoji-heldout"
        )
    prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {source!r} is empty; expected a prompt a line")
    return prompts


def _from_dataset(name: str, split: str, column: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except OSError as error:  # not found, or the hub not reached
        raise ValueError(f"no data set {name!r}: {str(error).splitlines()[0]}") from error
    if column not in rows.column_names:
        raise ValueError(f"data set {name!r} has no column {column!r}; it has {', '.join(rows.column_names)}")
    prompts = [str(prompt) for prompt in rows[column] if prompt]
    if not prompts:
        raise ValueError(f"data set {name!r} has no prompts in column {column!r}")
    return prompts
