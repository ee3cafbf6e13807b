"""What is put into a store on purpose: runs that were made here, and runs that are collected by many machines.

A run file is created last of all where nothing of the name is, so that a store never holds half of one; every step can
be done again after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.errors import ShardError, StoreError
from store import live
from store.remote import collecting
from store.remote.listings import FILE, LIVE, RESULTS
from store.remote.mirror import BESIDE, GATHERED, Mirror, is_made_here, mirror_of
from store.remote.refusals import Vanished

if TYPE_CHECKING:
    from store.info import RunInfo
    from store.remote.objects import Object

_INFO_BYTES = 8 << 20


def deliver(path: Path, tell: Callable[[str], None] | None = None) -> str | None:
    """Put a finished run of a mirror, its metrics, plans and evaluations into the store; then remove what its
    collection left there. Returns the run's URL; None for a run of a directory.

    Raises:
        StoreError: another run has the name, the run is not finished, or the store refuses. What is here stays.
    """
    mirror = mirror_of(path.parent)
    if mirror is None:
        return None
    name = path.name.removesuffix(FILE)
    say = tell or (lambda words: None)
    if not path.name.endswith(FILE) or not path.is_file():
        raise StoreError(f"{path} is no finished run: what is collected goes into {mirror.url} when it is finished")
    found = None
    if is_made_here(path):
        say(f"putting {name} into {mirror.url}")
        mirror.objects.create(path.name, path)
        found = mirror.objects.look(path.name)
        if found is None or not _is_the_same(mirror, path, found):
            raise StoreError(
                f"{mirror.url} has another run {name!r}: yours is kept; moescope runs rename {name} NEW --store"
                f" {mirror.url}, then moescope runs push NEW"
            )
    for file in _beside(path):
        if not file.is_symlink():
            say(f"putting {file.name} into {mirror.url}")
            mirror.objects.create(file.relative_to(mirror.directory).as_posix(), file)
    _clear(mirror, path)
    if found is not None:  # last of all: until then the run counts as not delivered, and all of this is done again
        mirror.adopt(path, found)
    mirror.forget()
    return mirror.objects.url_of(path.name)


def undelivered(directory: Path, name: str) -> Path | None:
    """A finished run of a mirror that was made here and is not (wholly) in the store yet; None otherwise."""
    path = directory / f"{name}{FILE}"
    mirror = mirror_of(directory)
    return path if mirror is not None and is_made_here(path) else None


def is_begun(directory: Path, name: str) -> bool:
    """Whether a remote store has an unfinished run of a name, which many machines began.

    Raises:
        StoreError: it cannot be listed.
    """
    mirror = mirror_of(directory)
    return mirror is not None and name in mirror.listing(fresh=True).live


def announce(folder: Path) -> str:
    """Tell a store that a run is being collected into it by many machines, from its folder in the mirror.

    Returns:
        The URL of its shards, for :func:`store.shard_target.shard_target` on any machine.

    Raises:
        StoreError: the name is taken there, or the store refuses; the folder stays as it was.
    """
    mirror = _mirror(folder)
    name = folder.name.removesuffix(LIVE)
    told, info = f"{folder.name}/run.json", (folder / "run.json").read_bytes()
    created = mirror.objects.create(told, info)
    left = created and collecting.markers(mirror.objects, folder.name)  # by a worker that outlived another run
    if left or name in mirror.listing(fresh=True).runs:
        if created:
            mirror.objects.remove(told)
        mirror.require_free(name)
    if not created and mirror.objects.read(told, _INFO_BYTES) != info:
        mirror.require_free(name)
    return mirror.objects.url_of(folder.name)


def publish_progress(folder: Path) -> None:
    """Show in the store how far a run is that :func:`announce` told of.

    Raises:
        StoreError: the store refuses.
    """
    mirror = _mirror(folder)
    for name in ("run.json", "progress.json"):
        if (folder / name).exists():
            mirror.objects.overwrite(f"{folder.name}/{name}", (folder / name).read_bytes())


def gather(folder: Path, tell: Callable[[int, int], None] | None = None) -> int:
    """Have all shards of a run that :func:`announce` told of in its folder here, to be merged; a folder that is not
    here, as on another machine or after a lost disk, is made. Returns how many shards there are.

    Raises:
        StoreError: there is no such run, or it cannot be read.
        ShardError: a shard is damaged.
        RunError: the disk is full.
    """
    mirror = _mirror(folder)
    try:
        info = mirror.objects.read(f"{folder.name}/run.json", _INFO_BYTES)
    except Vanished:
        if (folder / "run.json").exists():
            return len(live.shards(folder))  # begun without --ray
        raise StoreError(f"{mirror.url} has no unfinished run {folder.name.removesuffix(LIVE)!r}") from None
    if not folder.is_dir():
        collecting.begin(folder, info)
    if _begun(live.read_info(folder)) != _begun(_read_info(mirror, info)):
        raise StoreError(
            f"{mirror.objects.url_of(folder.name)} is another run than {folder}: continue that one where it was begun,"
            " or give yours another name with moescope runs rename"
        )
    (folder / GATHERED).unlink(missing_ok=True)
    return collecting.gather(mirror.objects, folder, tell)


def _beside(path: Path) -> Iterator[Path]:
    name = path.name.removesuffix(FILE)
    yield from (file for file in [path.with_name(name + RESULTS)] if file.is_file())
    for suffix in BESIDE:
        for file in sorted(path.with_name(name + suffix).glob("[!.]*.json")):
            if not file.name.startswith(("job-", "progress-")):
                yield file


def _is_the_same(mirror: Mirror, path: Path, found: Object) -> bool:
    """Whether the run in the store is the one here: the same size, and the same beginning."""
    from store.run import open_run

    if found.size != path.stat().st_size:
        return False
    mirror.forget()
    with open_run(path) as ours, open_object(mirror, path, found) as theirs:
        return _begun(ours.info) == _begun(theirs.info)


def open_object(mirror: Mirror, path: Path, found: Object) -> Run:
    """A run as it lies in the store, read in pieces."""
    from store.remote.ranged import OneRun
    from store.run import Run

    return Run(path, live_folder=False, lying=OneRun(mirror.objects, found))


def _clear(mirror: Mirror, path: Path) -> None:
    """Remove what the collection of a delivered run left in the store: of that very run, ``run.json`` last."""
    from store.run import open_run

    folder = path.name.removesuffix(FILE) + LIVE
    if folder not in mirror.listing(fresh=True).folders:
        return
    marker = f"{folder}/run.json"
    try:
        told = _read_info(mirror, mirror.objects.read(marker, _INFO_BYTES))
    except (StoreError, ShardError):
        return
    with open_run(path) as run:
        if _begun(run.info) != _begun(told):
            return  # somebody else's
    names = [name for name in mirror.objects.beneath(folder) if name != marker]
    for name in [*names, marker]:
        mirror.objects.remove(name)
    mirror.forget()


def _read_info(mirror: Mirror, content: bytes) -> RunInfo:
    from store.info import RunInfo

    try:
        return RunInfo.from_row(json.loads(content))
    except (ValueError, TypeError, AttributeError, LookupError):
        raise ShardError(f"{mirror.url} holds a run.json that cannot be read") from None


def _begun(info: RunInfo) -> tuple[object, ...]:
    return info.created_at, info.model, info.tool_version


def _mirror(folder: Path) -> Mirror:
    mirror = mirror_of(folder.parent)
    if mirror is None:
        raise StoreError(f"{folder} is not in the mirror of a remote store")
    return mirror


if TYPE_CHECKING:
    from store.run import Run
