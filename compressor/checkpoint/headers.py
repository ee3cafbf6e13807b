"""The header of a safetensors file: which tensors it holds, of which type and shape, and where their bytes stand.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data; offsets count from the data's begin, and
tensors lie one behind the other without gaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.errors import ModelError

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8,
    "C64": 64,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights that are not quantized."""

_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        name: its name.
        dtype: as the format names it (``BF16``).
        shape: its shape.
        file: the file that holds it.
        start: first byte, counted from the begin of the file.
        size: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8


def read_header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and its metadata.

    Raises:
        ModelError: the file cannot be read, is damaged or cut off.
    """
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ModelError(f"{path} is no safetensors file, or is cut off: its header would have {length} bytes")
            content = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} has a damaged header: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} has a damaged header: it holds no tensors")
    metadata = content.pop("__metadata__", None) or {}
    entries = sorted((_entry(path, name, value, 8 + length) for name, value in content.items()), key=_place)
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise ModelError(f"{path} has a damaged header: {entry.name} begins at {entry.start} instead of {end}")
        end += entry.size
    if end != size:
        raise ModelError(f"{path} has {size} bytes and its header speaks of {end}: copy or download it again")
    return entries, metadata


def _entry(path: Path, name: str, value: Any, begin: int) -> Entry:
    try:
        shape = tuple(int(length) for length in value["shape"])
        first, last = value["data_offsets"]
        dtype = value["dtype"]
        if dtype not in ITEM_BITS or min(shape, default=0) < 0 or size_of(dtype, shape) != last - first or first < 0:
            raise ValueError("type, shape and bytes do not fit together")
        return Entry(name, dtype, shape, path, begin + first, last - first)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} has a damaged header: {name}: {error}") from error


def _place(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.size


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds these tensors (name, dtype, shape) one behind the other."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + size_of(dtype, shape)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as other writers do it
    return struct.pack("<Q", len(text)) + text
