"""A GGUF file's key-values and tensors, with every declared length checked against the file before it is followed.

The reader of the package ``gguf`` trusts the lengths in a file; this one reads what an import needs, little-endian
versions 2 and 3, and refuses the rest.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError

MAX_ENTRIES = 1 << 20
MAX_TEXT = 1 << 20
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _F32 = 8, 9, 0


@dataclass(frozen=True)
class Tensor:
    """One tensor: its name, shape with the fastest axis last, type, and where its data begin."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass
class File:
    """An opened file: ``values`` by key, ``tensors`` by name."""

    path: Path
    data: mmap.mmap
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    start: int = 0

    def array(self, name: str) -> NDArray[np.float32]:
        """A tensor of 32-bit floats.

        Raises:
            ImportFileError: it has another type, or runs past the end of the file.
        """
        tensor = self.tensors[name]
        count = math.prod(tensor.shape)
        first = self.start + tensor.offset
        if tensor.kind != _F32 or first + 4 * count > len(self.data):
            raise ImportFileError(
                f"{self.path}: tensor {name} is of type {tensor.kind}, or runs past the end of the file"
            )
        return np.frombuffer(self.data, "<f4", count, first).reshape(tensor.shape)


def read(path: Path) -> File:
    """Open a GGUF file.

    Raises:
        ImportFileError: it is none, of another version, or its lengths do not fit its size.
    """
    if not path.is_file() or path.stat().st_size < 24:
        raise ImportFileError(f"{path} is no GGUF file: too short")
    with path.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    if cursor.take(4) != b"GGUF":
        raise ImportFileError(f"{path} is no GGUF file (the older .dat of llama-imatrix has no counts per expert)")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ImportFileError(f"{path} is GGUF version {version}; little-endian 2 and 3 are read")
    tensors, keys = cursor.count(), cursor.count()
    file = File(path, data)
    for _ in range(keys):
        name = cursor.text()
        file.values[name] = cursor.value(cursor.number("<I"), depth=0)
    for _ in range(tensors):
        name = cursor.text()
        axes = cursor.number("<I")
        if not 1 <= axes <= 4:
            raise ImportFileError(f"{path}: tensor {name[:60]!r} declares {axes} axes")
        lengths = [cursor.number("<Q") for _ in range(axes)]
        kind, offset = cursor.number("<I"), cursor.number("<Q")
        if math.prod(lengths) > len(data) or offset > len(data):
            raise ImportFileError(f"{path}: tensor {name[:60]!r} declares {lengths}, more than the file holds")
        file.tensors[name] = Tensor(name, tuple(reversed(lengths)), kind, offset)
    alignment = file.values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
        raise ImportFileError(f"{path} declares an alignment of {alignment!r}")
    file.start = -(-cursor.place // alignment) * alignment
    return file


class _Cursor:
    """Reads values one after another and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def take(self, length: int) -> bytes:
        if length < 0 or self.place + length > len(self.data):
            raise ImportFileError(f"{self.path} ends at byte {len(self.data)}, where {length} more are declared")
        taken = self.data[self.place : self.place + length]
        self.place += length
        return taken

    def number(self, form: str) -> Any:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def count(self) -> int:
        value = int(self.number("<Q"))
        if value > MAX_ENTRIES:
            raise ImportFileError(f"{self.path} declares {value} entries; at most {MAX_ENTRIES} are read")
        return value

    def text(self) -> str:
        length = int(self.number("<Q"))
        if length > MAX_TEXT:
            raise ImportFileError(f"{self.path} declares a text of {length} bytes; at most {MAX_TEXT} are read")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, *, depth: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 2:
            raise ImportFileError(f"{self.path} holds a value of type {kind}, which GGUF does not know")
        inner, length = int(self.number("<I")), int(self.number("<Q"))
        if length > len(self.data) - self.place:  # every entry takes a byte at least
            raise ImportFileError(f"{self.path} declares an array of {length} entries, more than the file holds")
        return [self.value(inner, depth=depth + 1) for _ in range(length)]
