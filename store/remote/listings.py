"""What a remote store holds, as it was last looked at: kept for a while, so that pages do not wait for the service."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moescope.errors import StoreError
from store.remote.refusals import Unreachable

if TYPE_CHECKING:
    from store.remote.objects import Object, Objects

FILE, RESULTS, LIVE = ".duckdb", ".derived.duckdb", ".live"

KEPT, STALE = 5.0, 120.0
"""Seconds: for which a listing is taken as it is; after which it is made again before anything is answered (in between,
in the background)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


@dataclass(frozen=True)
class Listing:
    """What a store held when it was looked at. ``trouble``: why it could not be looked at again since."""

    runs: dict[str, Object] = field(default_factory=dict)
    results: dict[str, Object] = field(default_factory=dict)
    live: frozenset[str] = frozenset()
    folders: frozenset[str] = frozenset()
    at: float = 0.0
    trouble: str = ""


class Listings:
    """The listings of one store; used from any thread.

    Args:
        objects: gives the store itself.
    """

    def __init__(self, objects: Callable[[], Objects]) -> None:
        self._objects = objects
        self._latest: Listing | None = None
        self._looking = threading.Lock()

    def forget(self) -> None:
        """Look again when it is asked for next."""
        self._latest = None

    def latest(self, *, fresh: bool = False) -> Listing:
        """What the store holds; asked for again when the last answer is old.

        Raises:
            StoreError: it cannot be listed, and was not before.
        """
        known, age = self._latest, time.monotonic() - (self._latest.at if self._latest else -1e9)
        if known is not None and not fresh and age < KEPT:
            return known
        if known is not None and not fresh and age < STALE:
            if self._looking.acquire(blocking=False):
                threading.Thread(target=self._look_behind, daemon=True).start()
            return known
        with self._looking:
            if known is not self._latest and self._latest is not None and not fresh:
                return self._latest  # somebody else was quicker
            self._look(fresh)
        assert self._latest is not None
        return self._latest

    def _look_behind(self) -> None:
        try:
            self._look(False)
        except StoreError as error:
            known = self._latest
            assert known is not None
            self._latest = Listing(known.runs, known.results, known.live, known.folders, time.monotonic(), str(error))
        finally:
            self._looking.release()

    def _look(self, must: bool) -> None:
        try:
            objects, folders = self._objects().listing()
        except Unreachable as error:
            known = self._latest
            if must or known is None:
                raise
            self._latest = Listing(known.runs, known.results, known.live, known.folders, time.monotonic(), str(error))
            return
        results = {one.name.removesuffix(RESULTS): one for one in objects if one.name.endswith(RESULTS)}
        runs = {one.name.removesuffix(FILE): one for one in objects if one.name.endswith(FILE)}
        runs = {name: one for name, one in runs.items() if is_name(name)}
        living = frozenset(name.removesuffix(LIVE) for name in folders if name.endswith(LIVE))
        self._latest = Listing(
            runs, {name: one for name, one in results.items() if name in runs},
            frozenset(name for name in living if is_name(name) and name not in runs), frozenset(folders),
            time.monotonic(),
        )  # fmt: skip


def is_name(name: str) -> bool:
    """Whether an object's name can be a run's: by the rules of names on this machine."""
    return _NAME.fullmatch(name) is not None and not name.endswith((LIVE, ".derived", FILE))
