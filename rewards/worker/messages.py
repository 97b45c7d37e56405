"""The messages exchanged with workers and servers: JSON and plain arrays, without pickles.

A message consists of the four bytes `SFR1`, the length of the header in bytes (uint32, little endian), the header as
JSON, and the bytes of the arrays one after another. The header's key `arrays` lists their dtypes and shapes. This file
is also loaded in the worker's environment, so it imports only the standard library and numpy.
"""

import json
import math
import socket
import struct
import time
from typing import Any, Iterator, Sequence  # noqa: UP035 (older interpreters too)

import numpy as np

MAGIC = b"SFR1"
DTYPES = ("uint8", "int64", "float32", "float64")
MAX_HEADER_BYTES = 16 * 2**20  # the header contains the prompts
MAX_BODY_BYTES = 2**29
MAX_BATCH_BYTES = 2**28  # of a batch of several images


class MessageError(ValueError):
    """The received bytes are not a valid message."""


def encode(header: "dict[str, Any]", arrays: "Sequence[np.ndarray]" = ()) -> bytes:
    """Encode a header and arrays as one message.

    Raises:
        ValueError: If the arrays are larger than 512 MiB together.
    """
    size = sum(array.nbytes for array in arrays)
    if size > MAX_BODY_BYTES:
        raise ValueError(f"a message with {size} bytes of arrays; expected at most {MAX_BODY_BYTES}")
    layout = [{"type": array.dtype.name, "shape": list(array.shape)} for array in arrays]
    head = json.dumps({**header, "arrays": layout}).encode()
    return b"".join([MAGIC, struct.pack("<I", len(head)), head, *(np.ascontiguousarray(a).tobytes() for a in arrays)])


def batch_slices(images: np.ndarray, batch_size: int) -> "Iterator[slice]":
    """Slices of at most `batch_size` images and, where there are several, at most 256 MiB."""
    size = max(1, min(batch_size, MAX_BATCH_BYTES // max(1, images[:1].nbytes)))
    for first in range(0, len(images), size):
        yield slice(first, min(first + size, len(images)))


def decode(message: bytes) -> "tuple[dict[str, Any], list[np.ndarray]]":
    """Decode the header and the arrays of one complete message.

    Raises:
        MessageError: If the bytes are not exactly one message.
    """
    header, layout, size = _head(message[:8], lambda length: message[8 : 8 + length])
    body = message[len(message) - size :] if size else b""
    begin = 8 + struct.unpack("<I", message[4:8])[0]
    if len(message) - begin != size:
        raise MessageError(f"{len(message) - begin} bytes of arrays; expected {size} by the header")
    return header, _arrays(body, layout)


def send(connection: socket.socket, message: bytes, deadline: "float | None" = None) -> None:
    """Send a complete message, or raise TimeoutError at the deadline (a value of `time.monotonic`)."""
    connection.settimeout(_remaining(deadline))
    connection.sendall(message)


def receive(connection: socket.socket, deadline: "float | None" = None) -> "tuple[dict[str, Any], list[np.ndarray]]":
    """Receive the next message.

    Raises:
        MessageError: If the received bytes are not a message.
        ConnectionError: If the other side has closed the connection.
        TimeoutError: At the deadline (a value of `time.monotonic`).
    """
    header, layout, size = _head(
        _exactly(connection, 8, deadline), lambda length: _exactly(connection, length, deadline)
    )
    return header, _arrays(_exactly(connection, size, deadline), layout)


def _head(start: bytes, read: Any) -> "tuple[dict[str, Any], list[tuple[str, tuple[int, ...]]], int]":
    if len(start) < 8 or start[:4] != MAGIC:
        raise MessageError(f"{start!r} instead of the start of a message")
    (length,) = struct.unpack("<I", start[4:])
    if length > MAX_HEADER_BYTES:
        raise MessageError(f"a header of {length} bytes; expected at most {MAX_HEADER_BYTES}")
    try:
        header = json.loads(read(length))
        layout = [(item["type"], tuple(item["shape"])) for item in header.pop("arrays")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MessageError(f"an invalid header: {error!r}") from None
    for dtype, shape in layout:
        if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise MessageError(f"an array of dtype {dtype!r} and shape {shape}; expected one of {', '.join(DTYPES)}")
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout)
    if size > MAX_BODY_BYTES:
        raise MessageError(f"{size} bytes of arrays; expected at most {MAX_BODY_BYTES}")
    return header, layout, size


def _arrays(body: bytes, layout: "list[tuple[str, tuple[int, ...]]]") -> "list[np.ndarray]":
    arrays, begin = [], 0
    for dtype, shape in layout:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        arrays.append(np.frombuffer(body[begin : begin + size], dtype=dtype).reshape(shape).copy())
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
