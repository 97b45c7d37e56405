"""Tables in plain text, for a terminal."""

import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

GAP = "  "
MIN_COLUMN = 12  # characters


def text_table(rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Cells in columns that are as wide as their longest cell, two spaces apart.

    Args:
        rows: The rows, of equally many cells; the first one usually holds the headings.
        width: Characters that a line may have. The widest columns are narrowed to it and their cells are wrapped; no
            column becomes narrower than 12 characters by it. None leaves every row on one line, as a pipe wants it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while width is not None and sum(widths) + len(GAP) * (len(widths) - 1) > width and max(widths) > MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, wide) or [""] for cell, wide in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append(GAP.join(part.ljust(wide) for part, wide in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines)


def terminal_width() -> int | None:
    """Characters in a line of the terminal that stdout is, or None if it is a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
