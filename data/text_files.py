"""Text files and file names: UTF-8 whatever the locale, without a byte order mark, lines that end at \\n or \\r\\n."""

import codecs
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from stepfuse.data.main_process import is_main_process

_BYTE_ORDER_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; line endings are left as they are.

    Raises:
        ValueError: for a file that cannot be read, or is not UTF-8 text, naming the line at fault.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no file {file_name(file)}") from None
    except OSError as error:
        raise ValueError(f"{file_name(file)} cannot be read: {error.strerror}") from error
    return decode_text(data, file_name(file))


def decode_text(data: bytes, name: str) -> str:
    """Decode UTF-8 text, without its byte order mark, or raise ValueError that names the text and the line at fault."""
    for encoding, marks in _BYTE_ORDER_MARKS.items():
        if data.startswith(marks):
            raise ValueError(f"{name} is {encoding} text; save it as UTF-8")
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[start:].decode()
    except UnicodeDecodeError as error:
        bad = start + error.start
        line = data.count(b"\n", 0, bad) + 1
        raise ValueError(
            f"{name} is not UTF-8 text: byte {data[bad]:#04x} at position {bad}, line {line}; save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{name} holds a NUL character in line {line}; expected UTF-8 text")
    return text


def read_lines(file: Path) -> list[str]:
    """The lines of a UTF-8 file without their endings; errors are those of `read_text` and `split_lines`."""
    return split_lines(read_text(file), file_name(file))


def split_lines(text: str, name: str) -> list[str]:
    """The lines of a text without their endings, which are \\n or \\r\\n.

    `str.splitlines` also splits at U+2028, U+0085, form feeds and others, which may stand within a prompt.

    Raises:
        ValueError: for a text whose lines end at \\r alone, as old Macintosh programs write them.
    """
    if "\n" not in text and "\r" in text.rstrip("\r"):
        raise ValueError(f"the lines of {name} end with a carriage return alone; save it with line feeds")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # after the last line feed
    return [line.removesuffix("\r") for line in lines]


def write_text(file: Path, text: str) -> None:
    """Write a file as UTF-8 with the line endings that the text has, on every platform."""
    file.write_bytes(printable(text).encode())


def file_name(path: str | Path) -> str:
    """A path as text that can be printed and written: bytes that are not UTF-8 become \\xe9 and the like."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_file(folder: Path, name: str) -> Path:
    """The path of a file that a UTF-8 text names, also where the locale encodes file names in another manner."""
    try:
        if (folder / name).exists():
            return folder / name
        return folder / os.fsdecode(name.encode())
    except ValueError:  # a surrogate, or a NUL
        return folder / name


def printable(text: object) -> str:
    """Text that UTF-8 can encode.

    Python reads bytes of file names and arguments that it cannot decode as lone surrogates (PEP 383): where they are
    UTF-8, they become the characters they stand for, and \\xe9 and the like otherwise.
    """
    try:
        return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return str(text).encode("utf-8", "backslashreplace").decode()


def one_line(text: object) -> str:
    """A text, such as that of an error, in one line of printable characters, and its middle left out if it is long."""
    text = str(text)
    text = text if len(text) <= 1000 else f"{text[:700]} … {text[-290:]}"
    text = " ".join(without_control_characters(text).split())
    return text if len(text) <= 300 else f"{text[:200]} … {text[-90:]}"


def first_line(error: BaseException) -> str:
    """The first line of an error that is not empty, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def short_repr(value: object) -> str:
    """A value as Python writes it, on one line, its end left out if it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def quoted(texts: Iterable[str], most: int = 3) -> str:
    """Distinct texts in quotes, separated by commas: the first few, and the number of others."""
    names = [repr(text) for text in dict.fromkeys(texts)]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def without_control_characters(text: object) -> str:
    """A text with a space for each character that is not printable."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def print_any_text() -> None:
    """Have standard output and standard error print characters that their encoding lacks as \\u591c and the like."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def note(text: str) -> None:
    """Print a line about the input on standard error, in the first of several processes only."""
    if is_main_process():
        print(printable(text), file=sys.stderr, flush=True)
