"""Untrusted safetensors files, opened and read once: bounded, checked, and hashed as they are read.

    length of the header, 8 bytes | header, JSON | tensors, one after another       (the format of safetensors)

The header is parsed here and not by the library, which opens a file once for its header and again for its tensors:
what is checked, what is hashed and what is loaded are the same bytes.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepfuse.data.json_file import parse_json
from stepfuse.data.text_files import one_line

MAX_FILE_BYTES = 2**33
MAX_HEADER_BYTES = 2**24
MAX_ELEMENTS = 2**27  # of one tensor: rank 512 on the widest layer of SDXL has 2**23
MAX_DIMENSIONS = 8
MAX_HEADER_VALUES = 2**20  # a tensor of a LoRA has about ten
# Types by their names in safetensors.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of files that were converted to save space; an import takes them.
SMALL_FLOATS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
OTHERS = {"BOOL": torch.bool, "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
DTYPES = FLOATS | SMALL_FLOATS | INTEGERS | OTHERS


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a header: its type as safetensors names it, its shape, and its bytes from `start` up to `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file of `size` bytes whose header was checked; `tensors` are in the order of their bytes."""

    def __init__(self, file: Path, handle: BufferedReader, size: int) -> None:
        self.file, self.size, self._handle = file, size, handle
        length = int.from_bytes(head := handle.read(8), "little")
        if len(head) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise self._damaged(f"a header of {length:,} bytes")
        self._head = head + handle.read(length)
        try:
            self.tensors, self.metadata = _parse_header(self._head[8:], size - len(self._head))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(one_line(error)) from error

    def tensor(self, key: str) -> Tensor:
        """One tensor; float8 comes as float16, which holds each of its values and which torch computes in."""
        return self._load(key)[0]

    def read(self, sha256: str | None = None, *, keep: bool = True) -> dict[str, Tensor]:
        """Every tensor, in one pass over the file; with a hash, those of exactly that file.

        Args:
            keep: False to check the file, a tensor at a time, and return none.

        Raises:
            ValueError: for another hash, and for numbers that are not finite.
        """
        digest, found, not_finite = hashlib.sha256(self._head), {}, None
        for key in self.tensors:
            value, data = self._load(key)
            digest.update(data)
            if not_finite is None and not bool(torch.isfinite(value).all()):
                not_finite = key
            if keep:
                found[key] = value
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ValueError(f"{self.file} is not the file that was recorded (sha256 differs); fetch it again")
        if not_finite is not None:
            raise ValueError(f"{self.file}: tensor {not_finite} is not finite everywhere; train the adapter again")
        return found

    def _load(self, key: str) -> tuple[Tensor, bytearray]:
        info = self.tensors[key]
        data = bytearray(info.end - info.start)
        self._handle.seek(len(self._head) + info.start)
        if self._handle.readinto(data) != len(data):
            raise self._damaged("it became shorter while it was read")
        dtype = DTYPES[info.dtype]
        value = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        value = value.reshape(info.shape)
        return value.half() if info.dtype in SMALL_FLOATS else value, data

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.file} is truncated or no safetensors file ({reason}); fetch it again")


@contextmanager
def open_tensors(
    file: Path,
    relevant: Callable[[str], bool] = lambda key: True,
    *,
    dtypes: tuple[str, ...] = tuple(FLOATS),
) -> Iterator[TensorFile]:
    """Open a safetensors file of a LoRA and check its header; no tensor is read.

    Args:
        relevant: whether a tensor of that key will be read; sizes and types of others are not checked.
        dtypes: types that tensors may have, by their names in safetensors.

    Raises:
        ValueError: for another file, one too large to be a LoRA, and one shorter or longer than its header says.
    """
    if not file.is_file():
        raise ValueError(f"no LoRA weights at {file}")
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{file} has {size:,} bytes; a LoRA has {MAX_FILE_BYTES:,} at most")
        opened = TensorFile(file, handle, size)
        if not opened.tensors:
            raise ValueError(f"{file} holds no tensors; train the adapter again")
        for key, info in opened.tensors.items():
            if not relevant(key):
                continue
            if math.prod(info.shape) > MAX_ELEMENTS:
                raise ValueError(f"{file}: tensor {key[:100]!r} of shape {list(info.shape)} is too large for a LoRA")
            if info.dtype not in dtypes and not (key.endswith("alpha") and info.dtype in INTEGERS):
                raise ValueError(f"{file}: tensor {key[:100]!r} is {info.dtype}; expected one of {', '.join(dtypes)}")
        yield opened


def _parse_header(text: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors in the order of their bytes, and the metadata, of a header followed by `size` bytes."""
    if not text.startswith(b"{"):  # other readers take no byte order mark
        raise ValueError("its header is not a JSON object")
    entries = parse_json(text, MAX_HEADER_VALUES)
    metadata = entries.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not all texts")
    tensors = [(key, _tensor_info(entry)) for key, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].end))
    edges = [0, *(edge for _, info in tensors for edge in (info.start, info.end)), size]
    if any(end != start for end, start in list(pairwise(edges))[::2]):
        raise ValueError("its tensors overlap, leave holes, or end elsewhere than the file")
    return dict(tensors), dict(metadata)


def _tensor_info(entry: dict[str, Any]) -> TensorInfo:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape):,} dimensions")
    if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"a tensor of type {dtype!r} and shape {shape!r}")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"a tensor of type {dtype} and shape {shape} has {end - start:,} bytes")
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=start, end=end)
