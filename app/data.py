"""The only module that caches: open runs and the frames made from them.

Every key holds ``run.version``, which changes when a run is published anew, so nothing goes stale and nothing expires.
What is kept is bounded by number and by bytes (:mod:`app.budget`); what came from a run that went away goes too.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
import streamlit as st

import store
from app.budget import Budget, Kept
from app.exhibits.exhibit import Exhibit
from app.figures.style import Theme
from app.markdown import plain
from compressor.plan import Plan
from moescope.sizes import size
from store import Catalog, Entry, Run
from store.remote import split_stores

STORE_VARIABLE = "MOESCOPE_STORE"

RUN_BYTES = 512 << 20
"""Of an open run that its reader may hold: pages of the file that were read once, kept for the next visit."""

store.confine(memory_limit=f"{RUN_BYTES}B")

_BUDGET = Budget()

_OPENED: dict[str, tuple[object, ...]] = {}
"""Path -> the version in which a run was opened last."""

FrameMaker = Callable[..., pl.DataFrame]
FramesMaker = Callable[..., dict[str, pl.DataFrame]]
Made = TypeVar("Made")


def store_directories() -> list[Path]:
    """The stores that the dashboard was started on: ``MOESCOPE_STORE``, several separated as in ``PATH``; of URLs,
    their mirrors.

    Raises:
        MoescopeError: a URL cannot be one of a store.
    """
    given = split_stores(os.environ.get(STORE_VARIABLE, ""))
    return [store.located(part).expanduser() for part in given] or [Path("runs")]


def entries() -> dict[str, Entry]:
    """All runs of all stores by name, the newest first; of two runs with one name, the first store's counts.

    Raises:
        StoreError: a store cannot be read.
    """
    found: dict[str, Entry] = {}
    directories = store_directories()
    for directory in directories:
        for entry in Catalog(directory).entries():
            found.setdefault(entry.name, entry)
    _let_go({str(entry.path) for entry in found.values()}, directories)
    return dict(sorted(found.items(), key=lambda item: _age(item[1])))


def troubles() -> list[str]:
    """Why remote stores could not be looked at when that was tried last: what is shown is what they held before."""
    mirrors = [store.remote.mirror_of(directory) for directory in store_directories()]
    return [found.listing().trouble for found in mirrors if found is not None and found.listing().trouble]


def arrive(entry: Entry) -> None:
    """Fetch a run of a remote store that is not here yet, with its name and size on the page meanwhile.

    Raises:
        MoescopeError: it cannot be fetched, or there is no room for it.
    """
    waiting = store.remote.waits_for(entry.path)
    if waiting is None:
        return
    with st.spinner(f"Fetching {plain(entry.name)}, {size(waiting)}, from {plain(store.shown(entry.path.parent))}"):
        store.bring(entry.path)


def open_run(path: Path) -> Run:
    """The run at a path, opened once per version; of former versions, the disk gets its space back.

    Raises:
        MoescopeError: it is gone, locked, or not a run.
    """
    store.bring(path)
    version = store.version_of(path)
    run: Run = _open(str(path), version)
    former = _OPENED.get(str(path))
    _OPENED[str(path)] = version
    if former not in (None, version):
        _open.clear(str(path), former)
        _BUDGET.let_go(str(path))
    return run


def _let_go(there: set[str], directories: list[Path]) -> None:
    """Close runs of the stores that have gone: the disk keeps a deleted file for as long as it is open."""
    for path in [path for path in list(_OPENED) if path not in there and Path(path).parent in directories]:
        version = _OPENED.pop(path, None)
        if version is not None:
            _open.clear(path, version)
            _BUDGET.let_go(path)


def frame(maker: Callable[..., Made], run: Run, /, **arguments: Any) -> Made:
    """What ``maker(run, **arguments)`` returns, computed once per version of the run. Do not change it in place."""
    key = (_named(maker), tuple(sorted(arguments.items())))
    found: Made = _frame(str(run.path), run.version, key).take(lambda: maker(run, **arguments), _BUDGET)
    return found


def plan(run: Run, **arguments: Any) -> Plan:
    """What ``planner.make(run, **arguments)`` returns, computed once per version of the run.

    Raises:
        PlanError: no such plan can be made of this run.
    """
    import planner

    kept = _plan(str(run.path), run.version, tuple(sorted(arguments.items())))
    with nullcontext() if kept else st.spinner("Planning"):
        found: Plan = kept.take(lambda: planner.make(run, **arguments), _BUDGET)
    return found


def made(maker: Callable[..., Any], run: Run, **arguments: Any) -> Any:
    """What ``maker(run, **arguments)`` returns where it is no frame, computed once per version of the run. Do not
    change it in place.

    Raises:
        MoescopeError: what ``maker`` raises.
    """
    key = (_named(maker), tuple(sorted(arguments.items())))
    return _made(str(run.path), run.version, key).take(lambda: maker(run, **arguments), _BUDGET)


def large(maker: Callable[..., Any], run: Run, **arguments: Any) -> Any:
    """As :func:`made`, for what holds a trace: only the last few are kept.

    Raises:
        MoescopeError: what ``maker`` raises.
    """
    key = (_named(maker), tuple(sorted(arguments.items())))
    return _large(str(run.path), run.version, key).take(lambda: maker(run, **arguments), _BUDGET)


def of_plan(maker: Callable[..., Made], run: Run, plan: Plan, **arguments: Any) -> Made:
    """What ``maker(run, plan, **arguments)`` returns, computed once per version of the run and per plan."""
    key = (_named(maker), plan.digest, tuple(sorted(arguments.items())))
    found: Made = _of_plan(str(run.path), run.version, key).take(lambda: maker(run, plan, **arguments), _BUDGET)
    return found


def detail(maker: FrameMaker, run: Run, **arguments: Any) -> pl.DataFrame:
    """As :func:`frame`, for frames of one sequence: they are large, so only the last few are kept."""
    key = (_named(maker), tuple(sorted(arguments.items())))
    found: pl.DataFrame = _detail(str(run.path), run.version, key).take(lambda: maker(run, **arguments), _BUDGET)
    return found


def exhibit(maker: Callable[..., Exhibit], run: Run, *, theme: Theme, **choices: Any) -> Exhibit:
    """What ``maker`` draws of a run, once per version of the run, theme and choices; its frames are kept too.

    Raises:
        Absent: the run cannot fill it.
    """
    key = (_named(maker), theme, tuple(sorted(choices.items())))
    kept = _exhibit(str(run.path), run.version, key)
    found: Exhibit = kept.take(lambda: maker(run, frames=frame, theme=theme, **choices), _BUDGET)
    return found


def frame_list(maker: Callable[[Run], list[str]], run: Run) -> list[str]:
    """A short list of names, such as phases, computed once per version of the run."""
    return _names(str(run.path), run.version, _named(maker), _maker=maker, _run=run)


def frames_of_two(maker: FramesMaker, run: Run, other: Run, **arguments: Any) -> dict[str, pl.DataFrame]:
    """What ``maker(run, other, **arguments)`` returns, computed once per version of both. Do not change it in place."""
    key = (_named(maker), tuple(sorted(arguments.items())))
    versions = (*run.version, str(other.path), *other.version)
    kept = _frames_of_two(str(run.path), versions, key)
    found: dict[str, pl.DataFrame] = kept.take(lambda: maker(run, other, **arguments), _BUDGET)
    return found


def reference(maker: FrameMaker) -> pl.DataFrame:
    """A frame that needs no run, such as published values."""
    return _reference(_named(maker), _maker=maker)


# No closing on release: another session may still read through the same connection; dropping the reference is enough.
@st.cache_resource(max_entries=8, show_spinner=False)
def _open(path: str, version: tuple[object, ...]) -> Run:
    return store.open_run(path)


@st.cache_resource(max_entries=256, show_spinner=False)
def _frame(path: str, version: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_resource(max_entries=32, show_spinner=False)
def _plan(path: str, version: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_resource(max_entries=32, show_spinner=False)
def _made(path: str, version: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_resource(max_entries=3, show_spinner=False)
def _large(path: str, version: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_resource(max_entries=64, show_spinner=False)
def _of_plan(path: str, version: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_resource(max_entries=8, show_spinner=False)
def _detail(path: str, version: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_resource(max_entries=96, show_spinner=False)
def _exhibit(path: str, version: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_data(max_entries=64, show_spinner=False)
def _names(
    path: str, version: tuple[object, ...], name: str, _maker: Callable[[Run], list[str]], _run: Run
) -> list[str]:
    return _maker(_run)


@st.cache_resource(max_entries=4, show_spinner=False)
def _frames_of_two(path: str, versions: tuple[object, ...], key: tuple[object, ...]) -> Kept:
    return Kept(path)


@st.cache_resource(max_entries=16, show_spinner=False)
def _reference(name: str, _maker: FrameMaker) -> pl.DataFrame:
    return _maker()


def _named(maker: Callable[..., Any]) -> str:
    """What tells a function from all others: its module and name; of a page, which runs as a script, its file."""
    module = maker.__module__ if maker.__module__ != "__main__" else inspect.getfile(maker)
    return f"{module}.{maker.__qualname__}"


def _age(entry: Entry) -> float:
    """Seconds before the epoch of the last change, so that the newest sorts first; 0 for what just vanished."""
    return _age_of_file(entry.path, entry.inode) if entry.modified is None else -entry.modified


@lru_cache(maxsize=1 << 14)
def _age_of_file(path: Path, inode: int) -> float:
    """As :func:`_age`. A run file is never written again, so each is asked once; of a folder that grows, the first
    answer holds."""
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0
