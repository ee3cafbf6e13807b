"""A trace laid out on disk layer by layer, so that every metric after the first reads a layer in an instant."""

from __future__ import annotations

import shutil
import tempfile
import threading
from io import BufferedRandom

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 16 << 30
"""Larger traces are unpacked from the run file each time."""

Key = tuple[int, int]
"""(entry of the run's layers, number of the block)."""


class Spool:
    """Arrays of ids by key in a temporary file without a name: it goes away with the object, and with a process that is
    killed."""

    def __init__(self) -> None:
        self._file: BufferedRandom | None = None
        self._places: dict[Key, tuple[int, tuple[int, ...]]] = {}
        self._bytes = 0
        self._turn = threading.Lock()

    def get(self, key: Key) -> NDArray[np.int16] | None:
        """The array under a key; None where none was kept."""
        if key not in self._places:
            return None
        offset, shape = self._places[key]
        ids = np.empty(shape, np.int16)
        assert self._file is not None, "what has a place was put there"
        with self._turn:
            self._file.seek(offset)
            self._file.readinto(_bytes_of(ids))
        return ids

    def put(self, key: Key, ids: NDArray[np.int16]) -> None:
        """Keep an array, unless it would take the room that others need."""
        with self._turn:
            if self._file is None:
                # not closed by a block: it lives as long as this object
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
            room = shutil.disk_usage(tempfile.gettempdir()).free - (1 << 30)
            if self._bytes + ids.nbytes > MAX_BYTES or ids.nbytes > room:
                return
            self._file.seek(self._bytes)
            self._file.write(_bytes_of(np.ascontiguousarray(ids)))
            self._places[key] = self._bytes, ids.shape
            self._bytes += ids.nbytes


def _bytes_of(ids: NDArray[np.int16]) -> memoryview:
    return ids.reshape(-1).view(np.uint8).data
