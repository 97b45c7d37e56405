"""What a set in a folder is called."""

from pathlib import Path

PLAIN = ("set", "output", "outputs")  # names of folders that say nothing of what is in them


def set_name(folder: str | Path) -> str:
    """The name of a set's folder; of one whose name says nothing, such as `set`, that of the folder around it."""
    resolved = Path(folder).resolve()
    names = (resolved.name, resolved.parent.name)
    return next((name for name in names if name and name not in PLAIN), resolved.name)
