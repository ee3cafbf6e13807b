"""A run file in a store, read where it lies: the few blocks that a question needs, through one open object.

DuckDB sees a file system of a name of its own that knows this one file, and opens nothing any more once it is sealed.
"""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import fsspec

from store.remote.objects import Object, Objects

BLOCK = 32 << 10


class RunObject(io.RawIOBase):
    """An object as a file that can be sought; blocks that were read are kept."""

    def __init__(self, objects: Objects, found: Object, blocks: dict[int, bytes]) -> None:
        self._objects, self._object, self._blocks, self._place = objects, found, blocks, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._object.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def read(self, size: int = -1) -> bytes:
        """The bytes from here on."""
        start = min(self._place, self._object.size)
        end = self._object.size if size is None or size < 0 else min(start + size, self._object.size)
        if end <= start:
            return b""
        first, last = start // BLOCK, (end - 1) // BLOCK
        missing = [block for block in range(first, last + 1) if block not in self._blocks]
        if missing:  # in one piece from the first to the last
            begin, stop = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, self._object.size)
            content = self._objects.piece(self._object.name, begin, stop)
            for block in range(missing[0], missing[-1] + 1):
                self._blocks[block] = content[block * BLOCK - begin : (block + 1) * BLOCK - begin]
        joined = b"".join(self._blocks[block] for block in range(first, last + 1))
        self._place = end
        return joined[start - first * BLOCK : end - first * BLOCK]

    def close(self) -> None:
        """Nothing is held open."""


class OneRun(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system that holds one run file, until it is sealed."""

    PATH = "moescope://run.duckdb"
    protocol = "moescope"
    cachable = False

    def __init__(self, objects: Objects, found: Object) -> None:
        super().__init__()
        self._objects, self._object, self.sealed = objects, found, False
        self._blocks: dict[int, bytes] = {}

    def exists(self, path: str, **_: Any) -> bool:
        """Only the run, and only before it is sealed."""
        return not self.sealed and path.endswith("run.duckdb")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Of the run."""
        self._require(path)
        return {"name": path, "size": self._object.size, "type": "file"}

    def modified(self, path: str) -> datetime:
        """Of the run."""
        self._require(path)
        return datetime.fromtimestamp(self._object.modified, UTC)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Nothing: no question lists it."""
        return []

    def glob(self, path: str, **_: Any) -> list[str]:
        """Nothing may be looked for."""
        raise PermissionError("nothing but the run that was opened can be read")

    def open(self, path: str, mode: str = "rb", **_: Any) -> RunObject:
        """The run, for reading."""
        self._require(path)
        if mode != "rb":
            raise PermissionError("a run in a store is never written")
        return RunObject(self._objects, self._object, self._blocks)

    def _require(self, path: str) -> None:
        if self.sealed or not path.endswith("run.duckdb"):
            raise FileNotFoundError("nothing but the run that was opened can be read")
