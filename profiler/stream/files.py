"""Safetensors files: which tensors they hold and where, and reads that land in memory which is there already.

The library maps whole files into memory, and every page that it touches counts as the process's own until the file is
closed. Here each tensor is read into the place where its values belong, and nothing else is ever resident.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moescope.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its name there.
        file: the file.
        kind: type of its values, as safetensors names it.
        shape: its shape.
        start: byte of the file at which its values begin.
        size: their bytes.
    """

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of its values.

        Raises:
            ModelError: one that only a quantized model can read.
        """
        if self.kind not in _TYPES:
            raise ModelError(f"{self.file.name}: {self.name} is stored as {self.kind}: dequantize the checkpoint first")
        return _TYPES[self.kind]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name; only the files' headers are read.

    Raises:
        ModelError: the folder has no safetensors, or a file that is missing or damaged.
    """
    found: dict[str, StoredTensor] = {}
    for path in _files(folder):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= path.stat().st_size:
                    raise ValueError("its header is damaged")
                header: dict[str, Any] = json.loads(file.read(length))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    found[name] = _stored(path, name, entry, 8 + length)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read ({error}): it is missing or damaged") from error
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} cannot be read: it is damaged") from error
        return [folder / name for name in sorted(set(names))]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    raise ModelError(f"{folder} has no safetensors: layers can be streamed from {INDEX} or {SINGLE} alone")


def _stored(path: Path, name: str, entry: dict[str, Any], base: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    known = _TYPES.get(entry["dtype"])
    if end < begin or base + end > path.stat().st_size or (known and end - begin != prod(shape) * known.itemsize):
        raise ValueError(f"{name} lies outside the file")
    return StoredTensor(name, path, entry["dtype"], shape, base + begin, end - begin)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the host, to be written to."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read(stored: StoredTensor) -> Tensor:
    """A tensor as it is stored."""
    values = torch.empty(stored.shape, dtype=stored.dtype)
    read_into([(stored, bytes_of(values))])
    return values


def read_into(places: Iterable[tuple[StoredTensor, memoryview]]) -> int:
    """Read tensors, each to its place, in the order in which the files hold them; returns the bytes read.

    Raises:
        ModelError: a file that is shorter than its header says, or cannot be read.
    """
    ordered = sorted(places, key=lambda place: (place[0].file, place[0].start))
    total = 0
    for path, group in groupby(ordered, key=lambda place: place[0].file):
        try:
            with path.open("rb", buffering=0) as file:
                at = 0
                for stored, target in group:
                    if stored.start != at:
                        file.seek(stored.start)
                    done = 0
                    while done < stored.size:  # one call reads at most 2 GiB
                        count = file.readinto(target[done:])
                        if not count:
                            raise ModelError(f"{path} ends within {stored.name}: the file was cut off")
                        done += count
                    at = stored.start + stored.size
                    total += stored.size
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    return total


def expect(tensors: Iterable[StoredTensor]) -> None:
    """Let the system begin to read tensors that are wanted next; they count as no memory of this process."""
    if not hasattr(os, "posix_fadvise"):
        return
    ordered = sorted(tensors, key=lambda stored: (stored.file, stored.start))
    for path, group in groupby(ordered, key=lambda stored: stored.file):
        spans: list[list[int]] = []
        for stored in group:
            if spans and spans[-1][1] == stored.start:
                spans[-1][1] += stored.size
            else:
                spans.append([stored.start, stored.start + stored.size])
        with path.open("rb") as file:
            for begin, end in spans:
                os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)


def read_sampled(stored: StoredTensor, places: Iterable[int]) -> Tensor:
    """Single values of a stored tensor, by their index in the flattened tensor."""
    width = stored.dtype.itemsize
    values = bytearray()
    with stored.file.open("rb", buffering=0) as file:
        for place in places:
            file.seek(stored.start + place * width)
            values += file.read(width)
    return torch.frombuffer(values, dtype=stored.dtype) if values else torch.empty(0, dtype=stored.dtype)
