"""A store: a directory of runs."""

from __future__ import annotations

import contextlib
import difflib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moescope.errors import StoreError
from store import derived, live
from store.run import FILE_SUFFIX
from store.writer import require_free, require_name

DEFAULT_STORE = Path("runs")


@dataclass(frozen=True)
class Entry:
    """One run in a store."""

    name: str
    path: Path
    live: bool
    size_bytes: int


class Catalog:
    """The runs of one directory, by name. A directory that does not exist is an empty store."""

    def __init__(self, directory: str | Path = DEFAULT_STORE) -> None:
        self.directory = Path(directory)

    def entries(self) -> list[Entry]:
        """All runs, sorted by name. A finished run hides the folder that it was compacted from.

        What has no printable name is none of ours, and what cannot be looked at may just have been deleted: left out.
        """
        finished = {_name(path): path for path in self._files() if _name(path).isprintable()}
        unfinished = {path.name.removesuffix(live.SUFFIX): path for path in self._folders() if path.name.isprintable()}
        found: dict[str, Entry] = {}
        for name, path in finished.items():
            with contextlib.suppress(OSError):
                found[name] = Entry(name, path, False, path.stat().st_size)
        for name, path in unfinished.items():
            found.setdefault(name, Entry(name, path, True, _folder_size(path)))
        return [found[name] for name in sorted(found)]

    def resolve(self, run: str | Path) -> Path:
        """The path of a run given as a path or as a name in this store.

        Raises:
            StoreError: neither; the message names close matches.
        """
        path = Path(run)
        if path.suffix == FILE_SUFFIX or path.name.endswith(live.SUFFIX):
            if path.exists():
                return path
            raise StoreError(f"no run at {path}")
        entries = {entry.name: entry.path for entry in self.entries()}
        if str(run) in entries:
            return entries[str(run)]
        near = difflib.get_close_matches(str(run), entries, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(list(entries)[:8]) or 'no runs yet'}"
        raise StoreError(f"no run {str(run)!r} in {self.directory}; {hint}")

    def require_free(self, name: str) -> None:
        """Check that a run of this name can be begun here.

        Raises:
            StoreError: the name cannot be one, or is taken by a run or by an unfinished collection.
        """
        require_free(self.directory, name)

    def rename(self, old: str, new: str) -> Path:
        """Give a run, and what lies beside it, another name.

        Raises:
            StoreError: no such run, a name that is taken or cannot be one, or a run that is being collected.
        """
        require_name(new)
        source = self.resolve(old)
        if any(entry.name == new for entry in self.entries()):
            raise StoreError(f"{self.directory} already has a run {new!r}")
        if source.is_dir():
            live.require_idle(source)
        for path, suffix in list(_belongings(source)):
            path.rename(path.with_name(new + suffix))
        return self.resolve(new)

    def delete(self, name: str) -> None:
        """Remove a run and what lies beside it (metric results, plans, evaluations).

        Raises:
            StoreError: no such run, or one that is being collected.
        """
        source = self.resolve(name)
        if source.is_dir():
            live.require_idle(source)
        for path, _ in list(_belongings(source)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _files(self) -> Iterator[Path]:
        if self.directory.is_dir():
            for path in self.directory.glob(f"*{FILE_SUFFIX}"):
                if not path.name.startswith(".") and not path.name.endswith(derived.SUFFIX):
                    yield path

    def _folders(self) -> Iterator[Path]:
        if self.directory.is_dir():
            yield from (path for path in self.directory.glob(f"*{live.SUFFIX}") if path.is_dir())


def _name(path: Path) -> str:
    return path.name.removesuffix(FILE_SUFFIX)


def _belongings(source: Path) -> Iterator[tuple[Path, str]]:
    """The files and folders of a run, each with what follows the run's name in theirs."""
    name = source.name.removesuffix(live.SUFFIX).removesuffix(FILE_SUFFIX)
    for suffix in (FILE_SUFFIX, live.SUFFIX, derived.SUFFIX, ".plans", ".evaluations"):
        path = source.with_name(name + suffix)
        if path.exists():
            yield path, suffix


def _folder_size(path: Path) -> int:
    total = 0
    for file in path.rglob("*.parquet"):
        with contextlib.suppress(OSError):  # shards go when they are compacted
            total += file.stat().st_size
    return total
