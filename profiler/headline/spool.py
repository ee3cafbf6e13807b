"""A trace laid out on disk layer by layer, so that every metric after the first reads a layer in an instant."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 16 << 30
"""Larger traces are unpacked from the run file each time."""

Key = tuple[int, int]
"""(entry of the run's layers, number of the block)."""


class Spool:
    """Arrays of ids by key in a temporary folder, which goes away with the object."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._shapes: dict[Key, tuple[int, ...]] = {}
        self._bytes = 0

    def get(self, key: Key) -> NDArray[np.int16] | None:
        """The array under a key; None where none was kept."""
        if key not in self._shapes:
            return None
        return np.fromfile(self._path(key), np.int16).reshape(self._shapes[key])

    def put(self, key: Key, ids: NDArray[np.int16]) -> None:
        """Keep an array, unless it would take the room that others need."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moescope-")
        room = shutil.disk_usage(self._folder.name).free - (1 << 30)
        if self._bytes + ids.nbytes > MAX_BYTES or ids.nbytes > room:
            return
        ids.tofile(self._path(key))
        self._shapes[key] = ids.shape
        self._bytes += ids.nbytes

    def _path(self, key: Key) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{key[0]}-{key[1]}"
