"""A store: a directory of runs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moescope.errors import StoreError
from store import derived, live, lock, remote
from store.run import FILE_SUFFIX
from store.whole import listing, refusal, remove, sweep, temporary_for
from store.writer import require_free, require_name

DEFAULT_STORE = Path("runs")


@dataclass(frozen=True)
class Entry:
    """One run in a store: its name, where it lies, whether it is being collected, and the number by which the file
    system tells its file or folder from another of the same name.

    Attributes:
        size, modified: bytes and seconds of change, where a remote store says them.
    """

    name: str
    path: Path
    live: bool
    inode: int
    size: int | None = None
    modified: float | None = None

    @cached_property
    def size_bytes(self) -> int:
        """Of the run file, or of the shards so far: asked of the disk when it is wanted; 0 for what has just gone."""
        if self.size is not None:
            return self.size
        try:
            if self.live:
                return sum(file.stat().st_size for file in self.path.rglob("*.parquet"))
            return self.path.stat().st_size
        except OSError:
            return 0


class Catalog:
    """The runs of one directory, or of a remote store given as a URL or as its mirror, by name. A directory that does
    not exist is an empty store."""

    def __init__(self, directory: str | Path = DEFAULT_STORE) -> None:
        self.directory = remote.located(directory)

    def __str__(self) -> str:
        """The directory, or the URL."""
        return remote.shown(self.directory)

    @property
    def is_remote(self) -> bool:
        """Whether the runs are in an object store."""
        return remote.mirror_of(self.directory) is not None

    def entries(self) -> list[Entry]:
        """All runs, sorted by name, from one look at the directory. A finished run hides the folder that it was
        compacted from.

        Raises:
            StoreError: the directory cannot be read, or the remote store cannot be listed.
        """
        mirror = remote.mirror_of(self.directory)
        found = self._made_here(copies=mirror is None)
        for values in mirror.entries() if mirror is not None else ():
            found.setdefault(values[0], Entry(*values))
        return [found[name] for name in sorted(found)]

    def _made_here(self, *, copies: bool) -> dict[str, Entry]:
        """The runs of the directory; without those that show a remote store's."""
        found: dict[str, Entry] = {}
        for entry in sorted(listing(self.directory), key=lambda entry: entry.name.endswith(live.SUFFIX)):
            name, path = entry.name, self.directory / entry.name
            if name.startswith(".") or name.endswith(derived.SUFFIX) or not name.isprintable():
                continue  # what has no printable name is none of ours
            if name.endswith(FILE_SUFFIX):
                stem, unfinished = name.removesuffix(FILE_SUFFIX), False
            elif name.endswith(live.SUFFIX) and entry.is_dir():
                stem, unfinished = name.removesuffix(live.SUFFIX), True
            else:
                continue
            if copies or not remote.is_copy(path):
                found.setdefault(stem, Entry(stem, path, unfinished, entry.inode()))
        return found

    def resolve(self, run: str | Path) -> Path:
        """The path of a run given as a path or as a name in this store.

        Raises:
            StoreError: neither; the message names close matches.
        """
        path = remote.run_path(run)
        if path.suffix == FILE_SUFFIX or path.name.endswith(live.SUFFIX):
            if path.exists() or remote.mirror_of(path.parent) is not None:
                return path
            raise StoreError(f"no run at {path}")
        entries = {entry.name: entry.path for entry in self.entries()}
        if str(run) in entries:
            return entries[str(run)]
        near = difflib.get_close_matches(str(run), entries, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(list(entries)[:8]) or 'no runs yet'}"
        raise StoreError(f"no run {str(run)!r} in {self}; {hint}")

    def require_free(self, name: str) -> None:
        """Check that a run of this name can be begun here.

        Raises:
            StoreError: the name cannot be one, or is taken by a run or by an unfinished collection.
        """
        if (mirror := remote.mirror_of(self.directory)) is not None:
            mirror.require_free(require_name(name))
        require_free(self.directory, name)

    def rename(self, old: str, new: str) -> Path:
        """Give a run, and what lies beside it, another name. The run itself comes last: broken off half-way, the same
        again ends it.

        Raises:
            StoreError: no such run, a name that is taken or cannot be one, or a run that is being collected.
        """
        require_name(new)
        source = self.resolve(old)
        self._require_ours(source, "renamed")
        if any(entry.name == new for entry in self.entries()):
            raise StoreError(f"{self} already has a run {new!r}")
        if source.is_dir():
            live.require_idle(source)
        for path, suffix in list(_belongings(source)):
            target = path.with_name(new + suffix)
            try:
                if suffix == derived.SUFFIX:
                    remove(target)  # of a run that had the name before
                path.rename(target)
            except OSError as error:
                raise refusal(target, error) from error
        return self.resolve(new)

    def delete(self, name: str) -> None:
        """Remove a run and what lies beside it (metric results, plans, evaluations). The run itself goes last, so that
        nothing of it is left to another run of the same name.

        Raises:
            StoreError: no such run, or one that is being collected.
        """
        source = self.resolve(name)
        self._require_ours(source, "deleted")
        if source.is_dir():
            live.require_idle(source)
            lock.release(source)
        for path, _ in list(_belongings(source)):
            hidden = temporary_for(path)
            try:
                os.rename(path, hidden)  # readers see all of a folder or nothing
            except OSError as error:
                raise refusal(path, error) from error
            remove(hidden)
        sweep(source.parent)

    def _require_ours(self, source: Path, done: str) -> None:
        if remote.mirror_of(source.parent) is not None and (remote.is_copy(source) or not source.exists()):
            raise StoreError(f"{remote.shown(source)} cannot be {done}: what is in a remote store stays as it is")


def _belongings(source: Path) -> Iterator[tuple[Path, str]]:
    """The files and folders of a run, itself last, each with what follows the run's name in theirs."""
    name = source.name.removesuffix(live.SUFFIX).removesuffix(FILE_SUFFIX)
    for suffix in (derived.SUFFIX, ".plans", ".evaluations", live.SUFFIX, FILE_SUFFIX):
        path = source.with_name(name + suffix)
        if path.exists():
            yield path, suffix
