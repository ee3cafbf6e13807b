"""A run that is being collected into a store: its shards there, and the folder ``NAME.live`` here that gathers them.

A shard is its files under ``NAME.live/.parts/NUMBER-RANDOM/`` and a marker ``NAME.live/shard-NUMBER.json``, which is
created last and only where none is: what is done twice counts once. ``run.json`` and ``progress.json`` lie beside.
These objects, of the very run that was delivered, are the only ones that are ever removed.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from moescope.errors import ShardError, StoreError
from store import live
from store.damage import damage
from store.remote.mirror import GATHERED
from store.remote.objects import Object
from store.remote.refusals import Vanished
from store.schema import tables
from store.whole import refusal, remove, temporary_for, write_whole

if TYPE_CHECKING:
    from store.remote.mirror import Mirror
    from store.remote.objects import Objects

LIVE_KEPT = 3.0
"""Seconds for which what was seen of a run that grows is taken as it is."""

_MARKER = re.compile(r"shard-(\d{6,9})\.json")
_PART = re.compile(r"\d{6,9}-[0-9a-f]{16}")
_MARKER_BYTES, _INFO_BYTES = 64 << 10, 8 << 20


class ObjectTarget:
    """Where workers put the shards of a run, as objects (see :class:`store.shard_target.ShardTarget`).

    Args:
        objects: the store.
        folder: ``NAME.live``.
    """

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects, self._folder = objects, folder

    def stage(self, number: int) -> Path:
        """A folder among the temporary ones of this machine."""
        return Path(tempfile.mkdtemp(prefix=f"moescope-{live.shard_name(number)}-"))

    def publish(self, number: int, folder: Path) -> bool:
        """Put the files, then the marker that makes them a shard; the folder is gone afterwards.

        Raises:
            StoreError: the store refuses; the shard is not there.
        """
        try:
            if self._objects.look(self._marker(number)) is not None:
                return False
            part = f"{number:06d}-{secrets.token_hex(8)}"
            files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            for name in files:
                self._objects.create(f"{self._folder}/.parts/{part}/{name}", folder / name, unheard=True)
            marker = json.dumps({"part": part, "files": files}, sort_keys=True)
            return self._objects.create(self._marker(number), marker.encode())
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def numbers(self) -> set[int]:
        """The numbers of the markers; one listing."""
        return set(markers(self._objects, self._folder))

    def _marker(self, number: int) -> str:
        return f"{self._folder}/{live.shard_name(number)}.json"


def object_target(url: str) -> ObjectTarget:
    """The shards at ``s3://bucket/prefix/NAME.live``, for a worker on any machine.

    Raises:
        InputError: the URL cannot be one, or its packages are not installed.
    """
    from store.remote.location import checked
    from store.remote.objects import Objects

    parent, _, folder = checked(url).rpartition("/")
    return ObjectTarget(Objects(parent), folder)


def markers(objects: Objects, folder: str) -> dict[int, str]:
    """Number and object of each shard that is whole."""
    found, _ = objects.listing(folder)
    named = ((_MARKER.fullmatch(one.name.rpartition("/")[2]), one.name) for one in found)
    return {int(match[1]): name for match, name in named if match}


def gather(objects: Objects, folder: Path, tell: Callable[[int, int], None] | None = None) -> int:
    """Fetch each shard that is in the store and not in a folder ``NAME.live`` here, once; returns how many are here.

    Broken off, the same again goes on: a shard appears in the folder whole or not at all.

    Raises:
        ShardError: what a marker says is not what is there, or a shard's sequences are in another one.
        StoreError: the store cannot be read.
        RunError: the disk is full.
    """
    known = markers(objects, folder.name)
    here = {live.shard_number(path) for path in live.shards(folder)}
    missing = sorted(set(known) - here)
    held = _sequences(live.files(folder, "sequence")) if missing else set()
    for done, number in enumerate(missing):
        _fetch_shard(objects, folder, number, known[number], held)
        if tell is not None:
            tell(len(known) - len(missing) + done + 1, len(known))
    return len(here | set(known))


def show(mirror: Mirror, folder: Path, *, shards: bool = True) -> None:
    """Have what there is of a run that is collected elsewhere: ``run.json``, ``progress.json``, its shards.

    Raises:
        StoreError: it is not collected any more.
        ShardError: it is damaged.
    """
    if folder.is_dir() and not (folder / GATHERED).exists():
        return  # collected by this machine
    objects, name = mirror.objects, folder.name.removesuffix(live.SUFFIX)
    if folder.is_dir() and time.monotonic() - mirror.shown.get(folder.name, -1e9) < LIVE_KEPT:
        return
    if name not in mirror.listing().live:
        remove(folder)
        raise StoreError(f"{objects.url_of(folder.name)} was finished or removed: open the run again")
    try:
        info = objects.read(f"{folder.name}/run.json", _INFO_BYTES)
    except Vanished:
        raise StoreError(f"{objects.url_of(folder.name)} is beginning: look again in a moment") from None
    if folder.is_dir() and (folder / "run.json").read_bytes() != info:
        remove(folder)  # another run of the same name
    if not folder.is_dir():
        begin(folder, info, shown=True)
    try:
        progress = objects.read(f"{folder.name}/progress.json", _INFO_BYTES)
        write_whole(folder / "progress.json", progress, lasting=False)
    except Vanished:
        pass
    if shards:
        gather(objects, folder)
        mirror.shown[folder.name] = time.monotonic()


def begin(folder: Path, info: bytes, *, shown: bool = False) -> None:
    """Make the folder ``NAME.live`` of a run that was begun elsewhere.

    Args:
        shown: it only shows the run.
    """
    temporary = temporary_for(folder)
    try:
        temporary.mkdir()
        (temporary / "run.json").write_bytes(info)
        if shown:
            (temporary / GATHERED).touch()
        temporary.rename(folder)
    except OSError as error:
        remove(temporary)
        if not folder.is_dir():
            raise refusal(folder, error) from error


def _fetch_shard(objects: Objects, folder: Path, number: int, marker: str, held: set[int]) -> None:
    """Fetch one shard; ``held`` are the sequences of those that are here, and gets its own."""
    part, files = _read_marker(objects, number, marker)
    temporary = temporary_for(folder / live.shard_name(number))
    try:
        temporary.mkdir()
        for name, size in files.items():
            piece = Object(f"{folder.name}/.parts/{part}/{name}", size, "", 0.0)
            try:
                whole = objects.copy(piece, temporary / name) == size
            except Vanished:
                whole = False
            if not whole:
                raise ShardError(f"{objects.url_of(marker)}: {name} of this shard is missing or not whole")
        found = _sequences([temporary / "sequence.parquet"] if "sequence.parquet" in files else [])
        if twice := sorted(found & held):
            raise ShardError(
                f"{objects.url_of(marker)} is of a worker that outlived its driver: sequence {twice[0]}"
                f"{f' and {len(twice) - 1} more' if len(twice) > 1 else ''} of this shard have been recorded anew and"
                " would count twice; remove that object and go on with --resume"
            )
        held |= found
        temporary.rename(folder / live.shard_name(number))
    except OSError as error:
        if not (folder / live.shard_name(number)).is_dir():  # else another process was quicker
            raise refusal(folder / live.shard_name(number), error) from error
    finally:
        remove(temporary)


def _sequences(files: list[Path]) -> set[int]:
    """Numbers of the sequences in these files of table ``sequence``."""
    try:
        return {one for file in files for one in pl.read_parquet(file, columns=["sequence"])["sequence"]}
    except (OSError, pl.exceptions.PolarsError) as error:
        raise damage(files[0].parents[1], error) from error


def _read_marker(objects: Objects, number: int, marker: str) -> tuple[str, dict[str, int]]:
    try:
        content: Any = json.loads(objects.read(marker, _MARKER_BYTES))
        part, files = content["part"], {str(name): int(size) for name, size in content["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ShardError(f"{objects.url_of(marker)} is damaged: it is no marker of a shard") from None
    known = {f"{name}.parquet" for name in tables()}
    if not isinstance(part, str) or not _PART.fullmatch(part) or not known.issuperset(files):
        raise ShardError(f"{objects.url_of(marker)} is damaged: it names files that no shard has")
    if int(part.partition("-")[0]) != number:  # a marker that somebody copied: its files would count twice
        raise ShardError(f"{objects.url_of(marker)} is damaged: it names the files of shard {part.partition('-')[0]}")
    return part, files
