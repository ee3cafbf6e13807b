"""A mirror: the folder on this machine that stands for a remote store.

What is in the store is listed and fetched when it is asked for; a fetched copy is a link ``NAME.duckdb`` into
``.objects/``, where the copy's name holds a hash of what the service said of the object. Whatever else lies in the
folder was made here: plans, evaluations, metrics, and runs that are not delivered yet.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.errors import StoreError
from store.documents import MAX_BYTES
from store.remote.listings import FILE, LIVE, RESULTS, Listing, Listings
from store.remote.location import no_place, url_of
from store.remote.room import COPIES, make_room, used_now
from store.whole import remove, replacing, temporary_for

if TYPE_CHECKING:
    from store.remote.objects import Object, Objects
    from store.remote.ranged import OneRun

BESIDE = (".plans", ".evaluations")
GATHERED = ".gathered"
"""In a folder ``NAME.live`` of a mirror: the run is collected elsewhere, and this only shows it."""

DOCUMENTS_KEPT = 60.0
"""Seconds for which the documents beside a run are taken as they are."""

_DOCUMENT = re.compile(r"(?!job-|progress-)[a-z]+-[0-9a-z-]{1,64}\.json")
_MOST_DOCUMENTS = 500

Tell = Callable[[str, int, int], None]
"""Told what is being fetched, and how many bytes of how many are here."""


class Mirror:
    """The mirror of one store in this process. Made by :func:`mirror_of`."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url, self.directory = url, directory
        self.listings = Listings(lambda: self.objects)
        self._documents: dict[str, tuple[float, tuple[str, ...]]] = {}
        self.shown: dict[str, float] = {}

    @cached_property
    def objects(self) -> Objects:
        """The store itself.

        Raises:
            InputError: the packages that speak to it are not installed.
        """
        from store.remote.objects import Objects

        return Objects(self.url)

    def listing(self, *, fresh: bool = False) -> Listing:
        """What the store holds; asked for again when the last answer is old.

        Raises:
            StoreError: it cannot be listed, and was not before.
        """
        return self.listings.latest(fresh=fresh)

    def entries(self) -> Iterator[tuple[str, Path, bool, int, int | None, float | None]]:
        """The runs of the store, as :class:`store.catalog.Entry` takes them.

        Raises:
            StoreError: see :meth:`listing`.
        """
        listing = self.listing()
        for name, one in listing.runs.items():
            number = int.from_bytes(hashlib.sha256(one.tag.encode()).digest()[:6])
            yield name, self.directory / (name + FILE), False, number, one.size, one.modified
        for name in listing.live:
            yield name, self.directory / (name + LIVE), True, 0, None, None

    def require_free(self, name: str) -> None:
        """Check that a run of a name can be begun in the store.

        Raises:
            StoreError: it has a run of that name, finished or not, or cannot be listed.
        """
        listing = self.listing(fresh=True)
        if name in listing.runs:
            raise StoreError(
                f"{self.url} already has a run {name!r}: choose another name (--name, or moescope runs rename)"
            )
        if name in listing.live:
            raise StoreError(
                f"{self.url} has an unfinished run {name!r}: continue it with --resume where it was begun, or choose"
                " another --name"
            )
        for path in (self.directory / (name + suffix) for suffix in (FILE, RESULTS, LIVE)):
            if is_copy(path):  # of a run that has left the store
                remove(path)

    def forget(self) -> None:
        """Look at the store again when it is asked for next."""
        self.listings.forget()
        self._documents.clear()
        self.shown.clear()

    def bring(self, path: Path, tell: Tell | None = None) -> tuple[str, ...]:
        """Have a run file, and what is small beside it, here and as it is in the store. A run made here stays as it is.

        Returns:
            One sentence per document beside it that cannot be read.

        Raises:
            StoreError: the store has no such run (any more), or it cannot be read.
            InputError: there is no room for it.
        """
        if is_made_here(path):
            return ()
        name = path.name.removesuffix(FILE)
        listing = self.listing()
        wanted = listing.runs.get(name)
        if wanted is None:
            gone = f"{self.url}/{path.name} is not there (any more)"
            raise StoreError(f"{gone}: list the store again with moescope runs --store {self.url}")
        self._have(path, wanted, tell, first=lambda: _remove_results(path))
        if listing.trouble:
            return self._documents.get(name, (0.0, ()))[1]
        at, sentences = self._documents.get(name, (-1e9, ()))
        if time.monotonic() - at > DOCUMENTS_KEPT:
            sentences = self._bring_beside(name, listing)
            self._documents[name] = (time.monotonic(), sentences)
        elif name in listing.results:
            self._have(path.with_name(name + RESULTS), listing.results[name], None)
        return sentences

    def is_here(self, path: Path) -> bool:
        """Whether a run was made here, or its copy is that of the last listing."""
        wanted = self.listing().runs.get(path.name.removesuffix(FILE))
        return is_made_here(path) or (wanted is not None and self._is_current(path, wanted))

    def size_of(self, path: Path) -> int:
        """Bytes of a run in the store; 0 where it has none."""
        wanted = self.listing().runs.get(path.name.removesuffix(FILE))
        return wanted.size if wanted else 0

    def lying(self, path: Path) -> OneRun | None:
        """A run as it lies in the store; None where the store has none."""
        from store.remote.ranged import OneRun

        wanted = self.listing().runs.get(path.name.removesuffix(FILE))
        return OneRun(self.objects, wanted) if wanted else None

    def adopt(self, path: Path, delivered: Object) -> None:
        """Keep a file that was made here, and is now in the store, as the copy of its object."""
        if path.is_file() and not path.is_symlink():
            copy = self._copy_of(path, delivered)
            copy.parent.mkdir(exist_ok=True)
            remove(copy)
            try:
                os.link(path, copy)
            except OSError:  # a file system without hard links
                os.replace(path, copy)
            self._point(path, copy)

    def _bring_beside(self, name: str, listing: Listing) -> tuple[str, ...]:
        """Metrics, plans and evaluations; those made here stay."""
        sentences = []
        if name in listing.results:
            self._have(self.directory / (name + RESULTS), listing.results[name], None)
        for suffix in BESIDE:
            if name + suffix not in listing.folders:
                continue
            folder = self.directory / (name + suffix)
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise no_place(folder, error) from error
            found = [one for one in self.objects.listing(folder.name)[0] if _DOCUMENT.fullmatch(Path(one.name).name)]
            for one in found[:_MOST_DOCUMENTS]:
                if one.size > MAX_BYTES:
                    sentences.append(
                        f"{one.name} has more than {MAX_BYTES >> 20} MiB, which no document beside a run has"
                    )
                else:
                    self._have(folder / Path(one.name).name, one, None)
            there = {Path(one.name).name for one in found}
            for path in folder.glob("*.json"):
                if path.is_symlink() and path.name not in there:
                    remove(path)
        return tuple(sentences)

    def _have(self, path: Path, wanted: Object, tell: Tell | None, first: Callable[[], None] | None = None) -> None:
        """Make ``path`` a copy of an object, unless it is, or was made here.

        Args:
            first: done before another copy takes the place of a former one.
        """
        if path.exists() and not path.is_symlink():
            return
        if self._is_current(path, wanted):
            used_now(path)
            return
        copy = self._copy_of(path, wanted)
        try:
            copy.parent.mkdir(exist_ok=True)
            with _alone(copy.parent / f".{path.name}.lock"):
                if not copy.exists():
                    make_room(wanted.size, self.objects.url_of(wanted.name))
                    self._fetch(wanted, copy, tell)
                if first is not None and path.is_symlink() and Path(os.readlink(path)).name != copy.name:
                    first()
                self._point(path, copy)
        except OSError as error:
            raise no_place(path, error) from error

    def _fetch(self, wanted: Object, copy: Path, tell: Tell | None) -> None:
        told = None if tell is None else lambda done, total: tell(wanted.name, done, total)
        with replacing(copy) as temporary:
            self.objects.fetch(wanted, temporary, told)
            if wanted.modified > 0:
                os.utime(temporary, (time.time(), wanted.modified))

    def _point(self, path: Path, copy: Path) -> None:
        """Let a name in the mirror stand for a copy, at once; the former copy goes."""
        former = Path(os.readlink(path)).name if path.is_symlink() else copy.name
        link = temporary_for(path)
        link.symlink_to(os.path.relpath(copy, path.parent))
        os.replace(link, path)
        if former != copy.name:
            remove(copy.with_name(former))

    def _copy_of(self, path: Path, wanted: Object) -> Path:
        flat = str(path.relative_to(self.directory)).replace(os.sep, "@")
        return self.directory / COPIES / f"{flat}@{hashlib.sha256(wanted.tag.encode()).hexdigest()[:16]}"

    def _is_current(self, path: Path, wanted: Object) -> bool:
        try:
            return Path(os.readlink(path)).name == self._copy_of(path, wanted).name and path.exists()
        except OSError:
            return False


_mirrors: dict[tuple[int, str], Mirror] = {}


def mirror_of(directory: Path) -> Mirror | None:
    """The mirror that a folder is; None for any other folder.

    Raises:
        InputError: see :func:`store.remote.location.url_of`.
    """
    url = url_of(directory)
    if url is None:
        return None
    key = (os.getpid(), str(directory.absolute()))
    found = _mirrors.get(key)
    if found is None or found.url != url:
        found = _mirrors.setdefault(key, Mirror(url, directory.absolute()))
    return found


def is_made_here(path: Path) -> bool:
    """Whether a run file in a mirror is no copy of an object."""
    return path.is_file() and not path.is_symlink()


def is_copy(path: Path) -> bool:
    """Whether a file or folder ``NAME.live`` of a mirror only shows what is in the store."""
    return path.is_symlink() or (path / GATHERED).exists()


def _remove_results(path: Path) -> None:
    """Metrics that were computed here of the object that a run file was before: they can be computed again."""
    results = path.with_name(path.name.removesuffix(FILE) + RESULTS)
    if results.is_file() and not results.is_symlink():
        remove(results)


class _alone:
    """One process, and one thread of it, at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        import fcntl

        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with suppress(OSError):  # a file system without locks: two may fetch the same, and one of them wins
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
