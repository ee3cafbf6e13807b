"""The objects under a store's URL, by whatever fsspec knows: listed, read, fetched, and created where none is.

The only place that speaks to a service. Nothing is overwritten or removed but below ``NAME.live/``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moescope.errors import StoreError
from store.remote.refusals import Unreachable, code_of, telling

Tell = Callable[[int, int], None]
"""Told how many bytes of how many are here."""

CHUNK = 8 << 20
_AT_ONCE, _TRIES = 4, 3
_CONNECT, _ANSWER, _PATIENCE = 4, 8, 10.0
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": _CONNECT, "read_timeout": _ANSWER,
            "retries": {"mode": "standard", "total_max_attempts": 2},
        },
    }
}  # fmt: skip


@dataclass(frozen=True)
class Object:
    """One object: its name below the store, its size, what tells it from another of the name, seconds of its change."""

    name: str
    size: int
    tag: str
    modified: float


class Objects:
    """What lies under one URL. Made for one process; threads may share it."""

    def __init__(self, url: str) -> None:
        self.url = url
        scheme = url.partition("://")[0]
        with telling(url, "read"):
            import fsspec

            options = _OPTIONS.get("s3" if scheme.startswith("s3") else scheme, {})
            self.system = fsspec.filesystem(scheme, skip_instance_cache=scheme != "memory", **options)
            if scheme.startswith("s3"):
                self.system.retries = 1  # failed pieces are asked for again here, see _piece
            self.root = str(self.system._strip_protocol(url)).rstrip("/")

    def url_of(self, name: str) -> str:
        """The URL of an object, to be shown."""
        return f"{self.url}/{name}"

    def listing(self, folder: str = "") -> tuple[list[Object], set[str]]:
        """The objects of one level, and the names of the folders in it; nothing where nothing is.

        Raises:
            StoreError: it cannot be listed; in one line.
        """
        path = f"{self.root}/{folder}" if folder else self.root
        with telling(self.url, "listed"):
            self.system.invalidate_cache()
            try:
                found = self.system.ls(path, detail=True)
            except FileNotFoundError as error:
                if error.__cause__ is not None:  # said by the service; of an empty folder, the library says it
                    raise
                found = []
        below = [(str(one["name"]).rstrip("/").removeprefix(path).lstrip("/"), one) for one in found]
        here = [(name, one) for name, one in below if name and "/" not in name]
        objects = [_object(f"{folder}/{name}" if folder else name, one) for name, one in here if one["type"] == "file"]
        return objects, {name for name, one in here if one["type"] == "directory"}

    def beneath(self, folder: str) -> list[str]:
        """The names of all objects below a folder, at any depth.

        Raises:
            StoreError: it cannot be listed.
        """
        with telling(self.url_of(folder), "listed"):
            self.system.invalidate_cache()
            found = self.system.find(f"{self.root}/{folder}")
        return sorted(str(name).removeprefix(self.root).lstrip("/") for name in found)

    def look(self, name: str) -> Object | None:
        """One object as it is now; None where there is none.

        Raises:
            StoreError: it cannot be asked for.
        """
        with telling(self.url_of(name), "read"):
            self.system.invalidate_cache()
            try:
                found = self.system.info(f"{self.root}/{name}")
            except FileNotFoundError:
                return None
        return _object(name, found) if found["type"] == "file" else None

    def read(self, name: str, most: int) -> bytes:
        """A small object, whole.

        Raises:
            StoreError: it is gone, cannot be read, or has more than ``most`` bytes.
        """
        with telling(self.url_of(name), "read"):
            content: bytes = self.system.cat_file(f"{self.root}/{name}", start=0, end=most + 1)
        if len(content) > most:
            raise StoreError(f"{self.url_of(name)} has more than {most:,} bytes, which nothing of its kind has")
        return content

    def piece(self, name: str, start: int, end: int) -> bytes:
        """The bytes ``start`` to ``end`` of an object; what the network lost is asked for again.

        Raises:
            StoreError: it is gone, or cannot be read.
        """
        began = time.monotonic()
        for left in range(_TRIES, 0, -1):
            try:
                with telling(self.url_of(name), "read"):
                    content: bytes = self.system.cat_file(f"{self.root}/{name}", start=start, end=end)
                return content
            except Unreachable:
                if left == 1 or time.monotonic() - began > _PATIENCE:
                    raise
                time.sleep(0.2 * (_TRIES - left + 1))
        raise AssertionError

    def fetch(self, wanted: Object, target: Path, tell: Tell | None = None) -> None:
        """Write an object into a file, piece by piece.

        Raises:
            StoreError: it is gone, cannot be read, or is another one now than was listed.
            OSError: the file cannot be written.
        """
        done = self.copy(wanted, target, tell)
        now = self.look(wanted.name)
        if now is None or now.tag != wanted.tag or done != wanted.size:
            raise Changed(f"{self.url_of(wanted.name)} changed while it was read: try again when it is whole")

    def copy(self, wanted: Object, target: Path, tell: Tell | None = None) -> int:
        """As :meth:`fetch`, of an object that never changes; returns how many bytes there were.

        Raises:
            StoreError, OSError: as :meth:`fetch`.
        """
        done = 0
        with target.open("wb") as file, ThreadPoolExecutor(_AT_ONCE) as pool:
            file.truncate(wanted.size)

            def write(start: int) -> int:
                return os.pwrite(file.fileno(), self.piece(wanted.name, start, min(start + CHUNK, wanted.size)), start)

            try:
                for count in pool.map(write, range(0, wanted.size, CHUNK)):
                    done += count
                    if tell is not None:
                        tell(done, wanted.size)
            finally:
                pool.shutdown(cancel_futures=True)
        return done

    def create(self, name: str, content: bytes | Path, *, unheard: bool = False) -> bool:
        """Put a new object in the store, whole or not at all; False where one of the name is there, which stays.

        Args:
            unheard: the name was made up at random, so nobody looks whether it is there.

        Raises:
            StoreError: it cannot be written.
        """
        path = f"{self.root}/{name}"
        if not unheard and self.look(name) is not None:  # some services know no atomic create
            return False
        with telling(self.url_of(name), "written"):
            try:
                if isinstance(content, Path):
                    self.system.put_file(str(content), path, mode="create")
                else:
                    self.system.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if code_of(error.__cause__ or error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                raise
        return True

    def overwrite(self, name: str, content: bytes) -> None:
        """Write a small object of a run that is being collected again.

        Raises:
            StoreError: it cannot be written.
        """
        _require_live(name)
        with telling(self.url_of(name), "written"):
            self.system.pipe_file(f"{self.root}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove an object of a run that was being collected.

        Raises:
            StoreError: it cannot be removed.
        """
        _require_live(name)
        with telling(self.url_of(name), "written"), suppress(FileNotFoundError):
            self.system.rm_file(f"{self.root}/{name}")


class Changed(StoreError):
    """An object was replaced while it was read."""


def _require_live(name: str) -> None:
    if not re.match(r"[^/]+\.live/.", name):
        raise AssertionError(f"{name}: only what is below NAME.live/ is ever changed or removed")


def _object(name: str, found: dict[str, Any]) -> Object:
    size, modified = int(found.get("size") or 0), 0.0
    for key in ("LastModified", "last_modified", "updated", "mtime", "modified", "created"):
        if found.get(key) is not None:
            modified = _seconds(found[key])
            break
    tag = str(found.get("ETag") or found.get("etag") or found.get("md5Hash") or modified).strip('"')
    return Object(name, size, f"{tag}/{size}", modified)


def _seconds(moment: object) -> float:
    if isinstance(moment, datetime):
        return moment.timestamp()
    if isinstance(moment, int | float):
        return float(moment)
    try:
        return datetime.fromisoformat(str(moment).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0
