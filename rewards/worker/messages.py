"""The messages exchanged with workers and servers: JSON and plain arrays, without pickles.

A message consists of the four bytes `SFR1`, the length of the header in bytes (uint32, little endian), the header as
JSON, and the bytes of the arrays one after another. The header's key `arrays` lists their dtypes and shapes. This file
is also loaded in the worker's environment, so it imports only the standard library and numpy.
"""

import io
import json
import math
import socket
import struct
import time
from typing import Any, Callable, Iterator, Sequence  # noqa: UP035 (older interpreters too)

import numpy as np

MAGIC = b"SFR1"
DTYPES = ("uint8", "int64", "float32", "float64")
MAX_HEADER_BYTES = 16 * 2**20  # the header contains the prompts
MAX_BODY_BYTES = 2**29
MAX_BATCH_BYTES = 2**28  # of a batch of several images


class MessageError(ValueError):
    """The received bytes are not a valid message."""


def encode(header: "dict[str, Any]", arrays: "Sequence[np.ndarray]" = ()) -> bytes:
    """Encode a header and arrays as one message, or raise ValueError if the arrays are larger than 512 MiB together."""
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
    """Decode the header and the arrays, or raise MessageError if the bytes are not exactly one message."""
    stream = io.BytesIO(message)
    decoded = _read(stream.read)
    if stream.tell() < len(message):
        raise MessageError(f"{len(message)} bytes; expected a message of {stream.tell()} bytes")
    return decoded


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

    def read(size: int) -> bytes:
        parts, missing = [], size
        while missing:
            connection.settimeout(_remaining(deadline))
            part = connection.recv(min(missing, 2**20))
            if not part:
                raise ConnectionError("the connection was closed")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    return _read(read)


def _read(read: "Callable[[int], bytes]") -> "tuple[dict[str, Any], list[np.ndarray]]":
    """Read a message by a function that returns the next bytes, or fewer at the end of what there is."""
    start = read(8)
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
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout]
    if sum(sizes) > MAX_BODY_BYTES:
        raise MessageError(f"{sum(sizes)} bytes of arrays; expected at most {MAX_BODY_BYTES}")
    arrays = []
    for (dtype, shape), size in zip(layout, sizes):  # noqa: B905 (older interpreters too)
        data = read(size)
        if len(data) < size:
            raise MessageError(f"an array of {len(data)} bytes; expected {size} by the header")
        arrays.append(np.frombuffer(data, dtype=dtype).reshape(shape).copy())
    return header, arrays


def _remaining(deadline: "float | None") -> "float | None":
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
