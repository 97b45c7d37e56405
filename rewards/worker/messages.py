"""What rewards in other processes are asked, and what they answer: JSON and plain arrays, never pickles.

A message is four bytes of magic, the length of its header (uint32, little endian), the header as JSON, then the bytes
of its arrays one after the other. The header's `arrays` lists their types and shapes. A worker's environment may hold
other versions of everything, so this file needs the standard library and numpy alone.
"""

import json
import math
import socket
import struct
import time
from typing import Any, Iterator, Sequence  # noqa: UP035 (older interpreters too)

import numpy as np

MAGIC = b"SFR1"
TYPES = ("uint8", "int64", "float32", "float64")
LONGEST_HEADER = 16 * 2**20  # prompts are in it
LARGEST_BODY = 2**29
BATCH_BYTES = 2**28  # of images in one message, where there are several


class MessageError(ValueError):
    """Bytes that are no message."""


def encode(header: "dict[str, Any]", arrays: "Sequence[np.ndarray]" = ()) -> bytes:
    """One message as bytes."""
    size = sum(array.nbytes for array in arrays)
    if size > LARGEST_BODY:
        raise ValueError(f"{size} bytes of arrays; at most {LARGEST_BODY}")
    described = [{"type": array.dtype.name, "shape": list(array.shape)} for array in arrays]
    head = json.dumps({**header, "arrays": described}).encode()
    return b"".join([MAGIC, struct.pack("<I", len(head)), head, *(np.ascontiguousarray(a).tobytes() for a in arrays)])


def batches(images: np.ndarray, batch_size: int) -> "Iterator[slice]":
    """Places of at most `batch_size` images, and no more of them than a message should hold."""
    size = max(1, min(batch_size, BATCH_BYTES // max(1, images[:1].nbytes)))
    for first in range(0, len(images), size):
        yield slice(first, min(first + size, len(images)))


def decode(message: bytes) -> "tuple[dict[str, Any], list[np.ndarray]]":
    """The header and the arrays of one whole message.

    Raises:
        MessageError: for anything else.
    """
    header, layout, size = _head(message[:8], lambda length: message[8 : 8 + length])
    body = message[len(message) - size :] if size else b""
    begin = 8 + struct.unpack("<I", message[4:8])[0]
    if len(message) - begin != size:
        raise MessageError(f"{len(message) - begin} bytes of arrays; the header says {size}")
    return header, _arrays(body, layout)


def send(connection: socket.socket, message: bytes, deadline: "float | None" = None) -> None:
    """All of a message, or TimeoutError at the deadline (of `time.monotonic`)."""
    connection.settimeout(_remaining(deadline))
    connection.sendall(message)


def receive(connection: socket.socket, deadline: "float | None" = None) -> "tuple[dict[str, Any], list[np.ndarray]]":
    """The next message.

    Raises:
        MessageError: for bytes that are none.
        ConnectionError: where the other side has gone.
        TimeoutError: at the deadline.
    """
    header, layout, size = _head(
        _exactly(connection, 8, deadline), lambda length: _exactly(connection, length, deadline)
    )
    return header, _arrays(_exactly(connection, size, deadline), layout)


def _head(start: bytes, read: Any) -> "tuple[dict[str, Any], list[tuple[str, tuple[int, ...]]], int]":
    if len(start) < 8 or start[:4] != MAGIC:
        raise MessageError(f"expected a message, got {start!r}")
    (length,) = struct.unpack("<I", start[4:])
    if length > LONGEST_HEADER:
        raise MessageError(f"a header of {length} bytes; at most {LONGEST_HEADER}")
    try:
        header = json.loads(read(length))
        described = header.pop("arrays")
        layout = [(item["type"], tuple(item["shape"])) for item in described]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"a header that cannot be read: {error!r}") from None
    for kind, shape in layout:
        if kind not in TYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise MessageError(f"an array of {kind!r} and shape {shape}; expected one of {', '.join(TYPES)}")
    size = sum(math.prod(shape) * np.dtype(kind).itemsize for kind, shape in layout)
    if size > LARGEST_BODY:
        raise MessageError(f"{size} bytes of arrays; at most {LARGEST_BODY}")
    return header, layout, size


def _arrays(body: bytes, layout: "list[tuple[str, tuple[int, ...]]]") -> "list[np.ndarray]":
    arrays, begin = [], 0
    for kind, shape in layout:
        size = math.prod(shape) * np.dtype(kind).itemsize
        arrays.append(np.frombuffer(body[begin : begin + size], dtype=kind).reshape(shape).copy())
        begin += size
    return arrays


def _exactly(connection: socket.socket, size: int, deadline: "float | None") -> bytes:
    parts, missing = [], size
    while missing:
        connection.settimeout(_remaining(deadline))
        part = connection.recv(min(missing, 2**20))
        if not part:
            raise ConnectionError("the connection was closed")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _remaining(deadline: "float | None") -> "float | None":
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
