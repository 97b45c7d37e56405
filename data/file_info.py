"""The SHA-256 hash of a file, and sizes in bytes as people read them."""

import hashlib
from pathlib import Path


def file_hash(file: Path) -> str:
    """Return the SHA-256 hash of a file's content as 64 hexadecimal digits."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def size_label(size: int) -> str:
    """Return a number of bytes with a decimal unit, as `485 B`, `1.8 GB` or `300 MB`; a dash for 0."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            value = size / unit
            return f"{value:.2g} {name}" if value < 99.5 else f"{value:.0f} {name}"
    return f"{size} B" if size else "–"


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
