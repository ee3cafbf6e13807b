"""Putting finished runs into a remote store: what ``collect``, ``import`` and ``runs push`` end with."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app import line

if TYPE_CHECKING:
    from store import Catalog


def deliver(path: Path) -> str:
    """Put a run into the store whose mirror it was made in; of a run in a directory, nothing. Returns where it is now.

    Raises:
        StoreError: the store refuses; the run is kept, and the message says how to go on.
    """
    from moescope.errors import StoreError
    from store.remote.delivery import deliver

    try:
        url = deliver(path, _tell)
    except StoreError as error:
        raise StoreError(f"{error}; the run is kept here: moescope runs push {path.stem} puts it there") from None
    finally:
        _tell("")
    return url or str(path)


def undelivered(directory: Path, name: str) -> Path | None:
    """A finished run of that name that was made here and is not in its remote store yet; with its metrics. Of one that
    many machines began and nobody finished, all shards are here afterwards."""
    from store import lacking_metrics
    from store.remote.delivery import gather, is_begun, undelivered

    path = undelivered(directory, name)
    if path is None and is_begun(directory, name):
        gather(directory / f"{name}.live")
    if path is not None and lacking_metrics(directory, name) is not None:
        from profiler.headline import compute_and_store

        compute_and_store(path, tell=_tell)
    return path


def push(catalog: Catalog, run: str) -> str:
    """Put a run into a remote store: one made in its mirror, by its name, or one of a directory, by its path.

    Raises:
        InputError: the store is a directory.
        StoreError: no such run, a name that is taken, or a store that refuses.
    """
    from moescope.errors import InputError, StoreError

    if not catalog.is_remote:
        raise InputError(f"{catalog} is a directory: runs push NAME --store s3://bucket/prefix puts a run into a store")
    path = catalog.resolve(run)
    if path.parent.absolute() == catalog.directory.absolute():
        return deliver(path)
    if path.is_dir():
        raise StoreError(f"{path} is being collected: push it when it is finished")
    catalog.require_free(path.stem)
    target = catalog.directory / path.name
    for suffix in (".derived.duckdb", ".plans", ".evaluations", ".duckdb"):
        found = path.with_name(path.stem + suffix)
        if found.is_dir():
            shutil.copytree(found, target.with_name(found.name), dirs_exist_ok=True)
        elif found.is_file():
            _copy(found, target.with_name(found.name))
    return deliver(target)


def _copy(source: Path, target: Path) -> None:
    from store import refusal, replacing

    try:
        with replacing(target) as temporary:
            try:
                os.link(source, temporary)
            except OSError:  # of another file system
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise refusal(target, error) from error


def _tell(words: str) -> None:
    """One line on a terminal, printed over itself."""
    if sys.stderr.isatty():
        if words:
            line.over(words)
        else:
            line.clear()
