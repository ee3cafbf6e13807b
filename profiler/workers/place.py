"""Where the shards of a shared collection go: into the run's folder, or into the store that the folder mirrors."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

import store as run_store
from moescope.errors import MoescopeError
from store import live
from store.remote import delivery
from store.remote.mirror import mirror_of
from store.whole import remove

PUBLISH_SECONDS = 15.0
"""A remote store learns so often how far a collection is."""


def take_up(directory: Path, name: str) -> run_store.RunWriter:
    """Go on with an interrupted run; of a remote store, with all shards that are there.

    Raises:
        StoreError: there is nothing to go on with, or another process works on it.
    """
    folder = directory / f"{name}{live.SUFFIX}"
    if mirror_of(directory) is not None and not folder.with_suffix(".duckdb").exists():
        delivery.gather(folder)
    return run_store.RunWriter.resume(directory, name)


class Place:
    """The shards of one run.

    A folder is shared by all nodes, under one path. Each driver has a folder of its own in it in which shards are
    staged: who resumes the run removes it first, so that what workers of an earlier driver still write cannot appear.

    Args:
        folder: ``NAME.live``.
        resuming: the run was begun before.

    Attributes:
        location, staging: for :func:`store.shard_target`, on any machine.
        target: the same here.
    """

    def __init__(self, folder: Path, *, resuming: bool) -> None:
        self._folder, self._remote = folder, mirror_of(folder.parent) is not None
        self._published = time.monotonic()
        if self._remote:
            if resuming:
                delivery.publish_progress(folder)
            self.location, self.staging = delivery.announce(folder), ""
        else:
            own = folder / f"{live.STAGING}{secrets.token_hex(4)}"
            own.mkdir()
            self.location, self.staging = str(folder), str(own)
        self.target = run_store.shard_target(self.location, self.staging)

    def tell(self, *, now: bool = False) -> None:
        """Show others how far the run is, where they cannot see the folder; a store that refuses now may do later."""
        if self._remote and (now or time.monotonic() - self._published >= PUBLISH_SECONDS):
            self._published = time.monotonic()
            with suppress(MoescopeError):
                delivery.publish_progress(self._folder)

    def gather(self) -> None:
        """Have all shards in the folder, to be merged.

        Raises:
            MoescopeError: the store cannot be read, or the disk is full.
        """
        if self._remote:
            delivery.gather(self._folder)

    def close(self) -> None:
        """Nothing more is staged."""
        if self.staging:
            remove(Path(self.staging))
        self.tell(now=True)
