"""Arrays of NumPy's files, read as streams with every declared size checked before anything is allocated."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError

MAX_HEADER = 1 << 16
MAX_SMALL = 1 << 28
"""Bytes of an array that is read whole: labels, offsets, token ids are taken in parts above that."""

MAX_INFLATION = 200
"""Times that a member may grow when it is inflated, above MAX_SMALL: routing shrinks to a fifth at best."""


@dataclass(frozen=True)
class Header:
    """What an .npy header declares."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of axis 0."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Archive:
    """The arrays of an .npz file.

    Raises:
        ImportFileError: it is no zip file of plain arrays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ImportFileError(f"{path} is no .npz file: {error}") from error
        self._members = {name.removesuffix(".npy"): info for name, info in self._infos() if name.endswith(".npy")}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return sorted(self._members)

    def header(self, name: str) -> Header:
        """Shape and type of one array.

        Raises:
            ImportFileError: there is no such array, or its header does not fit its size.
        """
        with self._open(name) as stream:
            return self._checked(name, stream)

    def whole(self, name: str) -> NDArray[Any]:
        """A small array at once.

        Raises:
            ImportFileError: it is larger than ``MAX_SMALL``, damaged, or missing.
        """
        with self._open(name) as stream:
            header = self._checked(name, stream)
            if header.bytes > MAX_SMALL:
                raise ImportFileError(
                    f"{self.path}: {name} declares {header.bytes} bytes; at most {MAX_SMALL} are read"
                )
            return self._rows(name, stream, header, header.shape[0] if header.shape else 1).reshape(header.shape)

    def blocks(self, name: str, rows: int) -> Iterator[NDArray[Any]]:
        """An array in blocks of at most ``rows`` entries of axis 0.

        Raises:
            ImportFileError: it ends early, or is damaged.
        """
        with self._open(name) as stream:
            header = self._checked(name, stream)
            for start in range(0, header.shape[0], rows):
                yield self._rows(name, stream, header, min(rows, header.shape[0] - start))

    def _infos(self) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        size = self.path.stat().st_size
        for info in self._zip.infolist():
            if info.compress_size > size:
                raise ImportFileError(f"{self.path}: {info.filename} declares more bytes than the file has")
            if info.file_size > MAX_SMALL and info.file_size > MAX_INFLATION * max(info.compress_size, 1):
                raise ImportFileError(
                    f"{self.path}: {info.filename} would grow from {info.compress_size} to {info.file_size} bytes;"
                    f" more than {MAX_INFLATION} times is not read"
                )
            yield info.filename, info

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._members:
            raise ImportFileError(f"{self.path} has no array {name!r}; it has {', '.join(self.names) or 'none'}")
        return self._zip.open(self._members[name])

    def _checked(self, name: str, stream: IO[bytes]) -> Header:
        header, length = read_header(stream, f"{self.path}: {name}")
        if length + header.bytes != self._members[name].file_size:
            raise ImportFileError(
                f"{self.path}: {name} declares {header.dtype} {header.shape}, {header.bytes} bytes, but holds"
                f" {self._members[name].file_size - length}"
            )
        return header

    def _rows(self, name: str, stream: IO[bytes], header: Header, rows: int) -> NDArray[Any]:
        wanted = rows * header.row_bytes if header.shape else header.dtype.itemsize
        data = stream.read(wanted)
        if len(data) != wanted:
            raise ImportFileError(f"{self.path}: {name} ends early")
        return np.frombuffer(data, header.dtype).reshape(rows, *header.shape[1:])


def read_header(stream: IO[bytes], where: str) -> tuple[Header, int]:
    """The header at the start of an .npy stream, and its length in bytes.

    Raises:
        ImportFileError: it is none, or declares objects (which would have to be unpickled) or Fortran order.
    """
    # NumPy's functions read what a stream gives; typed for files only.
    file = cast("IO[Any]", stream)
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ImportFileError(f"{where} has .npy version {version}; 1.0 and 2.0 are read")
        shape, fortran, dtype = readers[version](file, max_header_size=MAX_HEADER)
    except ImportFileError:
        raise
    except Exception as error:  # NumPy parses the header as a Python literal: damage raises whatever it may
        raise ImportFileError(f"{where} has no header of an .npy array: {str(error).splitlines()[0][:120]}") from error
    if dtype.hasobject or dtype.fields is not None or dtype.itemsize == 0 or dtype.subdtype is not None:
        raise ImportFileError(f"{where} holds {dtype}; only plain numbers and texts are read, nothing is unpickled")
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise ImportFileError(f"{where} declares the shape {shape}")
    if fortran and len(shape) > 1:
        raise ImportFileError(f"{where} is in Fortran order: save it with numpy.ascontiguousarray")
    return Header(tuple(shape), dtype), stream.tell()
