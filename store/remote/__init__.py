"""Runs in an object store: listed without being fetched, fetched once, never changed.

A remote store is a folder on this machine, its mirror, from which everything goes on with paths::

    import store
    directory = store.located("s3://bucket/runs")       # ~/.cache/moescope/..., named by a hash of the URL
    store.Catalog(directory).entries()                  # what is in the bucket, and what was made here
    run = store.open_run(directory / "mine.duckdb")     # fetched if it is not here, or is another one now
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from store.remote.location import is_url, located, split_stores, url_of

if TYPE_CHECKING:
    from store.remote.mirror import Mirror, Tell
    from store.remote.ranged import OneRun

__all__ = [
    "bring", "is_copy", "is_url", "located", "lying", "mirror_of", "run_path", "shown", "split_stores",
    "stay", "tell_by", "url_of", "waits_for",
]  # fmt: skip

_stays = False
_tell: Tell | None = None


def stay() -> None:
    """From now on this process takes mirrors as they are: whoever started it has looked at the store."""
    global _stays
    _stays = True


def tell_by(tell: Tell | None) -> None:
    """Who is told how far a fetch is, where nobody else is named."""
    global _tell
    _tell = tell


def mirror_of(directory: Path) -> Mirror | None:
    """The mirror that a folder is; None for any other folder, at the price of one look for a file."""
    from store.remote.location import NAME_FILE

    if not os.path.exists(directory / NAME_FILE):
        return None
    from store.remote.mirror import mirror_of

    return mirror_of(directory)


def run_path(run: str | os.PathLike[str]) -> Path:
    """The path of a run given as a path or as ``s3://bucket/prefix/NAME.duckdb``.

    Raises:
        InputError: the URL cannot be one.
    """
    if not is_url(run):
        return Path(run)
    parent, _, name = str(run).rstrip("/").rpartition("/")
    return located(parent) / name


def bring(path: Path, tell: Tell | None = None, *, shards: bool = True) -> tuple[str, ...]:
    """Have a run of a mirror here; nothing to do for any other path.

    Args:
        tell: told how far it is.
        shards: of a run that is being collected, fetch its shards too.

    Returns:
        One sentence per file beside it that cannot be read.

    Raises:
        StoreError: it is not in the store (any more), or cannot be read.
        InputError: there is no room for it.
    """
    if _stays or (found := mirror_of(path.parent)) is None:
        return ()
    if path.name.endswith(".live"):
        from store.remote.collecting import show

        show(found, path, shards=shards)
        return ()
    return found.bring(path, tell or _tell)


def lying(path: Path) -> OneRun | None:
    """A finished run of a mirror as it lies in the store, to be read in pieces; None for any that is here.

    Raises:
        StoreError: the store cannot be listed.
    """
    if _stays or path.name.endswith(".live") or (found := mirror_of(path.parent)) is None or found.is_here(path):
        return None
    return found.lying(path)


def waits_for(path: Path) -> int | None:
    """Bytes that would be fetched to open a run; None where it is here.

    Raises:
        StoreError: the store cannot be listed.
    """
    if (found := mirror_of(path.parent)) is None or path.name.endswith(".live") or found.is_here(path):
        return None
    return found.size_of(path)


def is_copy(path: Path) -> bool:
    """Whether a file or folder ``NAME.live`` of a mirror only shows what is in the store."""
    return path.is_symlink() or (path / ".gathered").exists()


def shown(path: Path) -> str:
    """A store, or a run in one, as people know it: the URL for what is in a mirror."""
    for directory, rest in ((path, ""), (path.parent, f"/{path.name}")):
        url = url_of(directory)
        if url is not None:
            return url + rest
    return str(path)
