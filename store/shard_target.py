"""Where shards go: a folder of finished Parquet files becomes shard number n of a run, whole or not at all.

A shard that is there is never replaced, so that a piece of work which was done twice counts once.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

from store import live
from store.whole import code_of, remove, sync, temporary_for


class ShardTarget(Protocol):
    """The shards of one run, wherever they lie."""

    def stage(self, number: int) -> Path:
        """An empty folder of this machine, to write the Parquet files of a shard into; :meth:`publish` takes it.

        Raises:
            OSError: it cannot be made.
        """

    def publish(self, number: int, folder: Path) -> bool:
        """Make a staged folder shard ``number``; the folder is gone afterwards.

        Returns:
            False where that shard was there already: then nothing has changed.

        Raises:
            OSError: the place refuses; nothing of the shard is there.
        """

    def numbers(self) -> set[int]:
        """Which shards are there."""


class FolderTarget:
    """Shards as folders ``NAME.live/shard-000012/``, renamed into place.

    Args:
        folder: ``NAME.live``.
        staging: where folders are made that are to be renamed, on the same file system; the run's folder itself if not
            given. Who removes it shuts out everyone who still writes there.
    """

    def __init__(self, folder: Path, staging: Path | None = None) -> None:
        self.folder, self.staging = folder, staging or folder

    def stage(self, number: int) -> Path:
        """A hidden folder beside the shards."""
        folder = temporary_for(self.staging / live.shard_name(number))
        folder.mkdir()
        return folder

    def publish(self, number: int, folder: Path) -> bool:
        """Make the files last, and rename the folder."""
        try:
            for file in folder.iterdir():
                sync(file)
            sync(folder)
            os.rename(folder, self.folder / live.shard_name(number))  # a folder that holds something is never replaced
            sync(self.folder)
        except OSError as error:
            remove(folder)
            if code_of(error) in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        return True

    def numbers(self) -> set[int]:
        """One look at the folder."""
        return {live.shard_number(path) for path in live.shards(self.folder)}


def shard_target(location: str, staging: str = "") -> ShardTarget:
    """The shards at a location.

    Args:
        location: a folder ``NAME.live``, or the URL of one in a remote store.
        staging: see :class:`FolderTarget`.
    """
    if "://" in location:
        from store.remote.collecting import object_target

        return object_target(location)
    return FolderTarget(Path(location), Path(staging) if staging else None)
