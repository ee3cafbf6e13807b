"""What tells one state of a run from another: a key for caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from store import derived, evaluations, live
from store.whole import listing


def version_of(path: Path) -> tuple[object, ...]:
    """What changes whenever the content of a run changes, or a measurement beside it: a key for caches.

    However many shards there are, it asks about the last one only. A clock that was set back changes nothing: what
    replaces a file has another inode, or another time.
    """
    measured = [Path(entry.path) for entry in listing(evaluations.folder_of(path)) if entry.name.endswith(".json")]
    if path.name.endswith(live.SUFFIX):
        shards = live.shards(path)  # the last one tells a collection from another that had the name before
        return (str(path), len(shards), *_stamps([*shards[-1:], *measured]))
    return (str(path), *_stamps([path, derived.path_of(path), *measured]))


def _stamps(files: Iterable[Path]) -> Iterator[object]:
    """What changes when one of the files is replaced, written over, added or deleted."""
    for file in files:
        try:
            status = file.stat()
        except OSError:  # not there, or just deleted
            continue
        yield from (file.name, status.st_mtime_ns, status.st_size, status.st_ino)
