"""One token on the clock: a way to serve, replayed and timed, and what happens during one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

import store
from app.frames.axes import layer_label
from app.frames.caching import narrowed, split
from planner.cache.setting import Setting, setting_of
from planner.cache.study import Study
from planner.cache.token import token_events
from planner.cache.ways import WAYS, Served, serve, way_of

_EVENTS = {
    "lane": pl.String, "kind": pl.String, "layer": pl.String, "expert": pl.Int32, "begin_ms": pl.Float64,
    "end_ms": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True)
class Clocked:
    """One way, replayed and timed; ``layers``: names of the MoE layers."""

    setting: Setting
    served: Served
    layers: tuple[str, ...]


def drawn_ways(found: Study) -> list[str]:
    """Names of the ways whose tokens can be drawn: those without prefetching, the fastest first."""
    known = {way.name for way in WAYS}
    return [one.name for one in found.ways if one.name in known]


def clocked(run: store.Run, *, way: str, name: str, bits: int | None = None, **asked: Any) -> Clocked:
    """One way of :func:`app.frames.caching.answer` again, with its setting; a second or two.

    Raises:
        PlanError: as :func:`app.frames.caching.answer`.
    """
    machine, serving = split(name, asked)
    setting = setting_of(run, machine, plan=narrowed(run, bits), **serving)
    served = serve(setting, way_of(way), slots=min(setting.slots, setting.all_slots))
    return Clocked(setting, served, tuple(layer_label(*key) for key in setting.test.layers))


def marks(found: Clocked) -> dict[str, int]:
    """Number of the pass whose time is the median, the 95th percentile, the most and the least; ties: the first."""
    seconds = found.served.clock.pass_seconds
    order = np.argsort(seconds, kind="stable")
    last = len(order) - 1
    places = {"typical": round(0.5 * last), "slow": round(0.95 * last), "slowest": last, "fastest": 0}
    return {name: int(np.flatnonzero(seconds == seconds[order[place]])[0]) for name, place in places.items()}


def place_of(found: Clocked, at: int) -> tuple[int, int, str, float]:
    """Number of the sequence in the run, position in it, domain, and milliseconds of a pass."""
    work = found.setting.test
    request = int(np.searchsorted(work.offsets, at, side="right")) - 1
    milliseconds = 1e3 * float(found.served.clock.pass_seconds[at])
    return int(work.sequences[request]), at - int(work.offsets[request]), work.domains[request], milliseconds


def events(found: Clocked, at: int) -> pl.DataFrame:
    """What device, link and CPU do during one pass: lane, kind, layer, expert (null where it is none), begin and end in
    milliseconds."""
    rows = [
        (
            one.lane, one.kind, found.layers[one.layer] if one.layer >= 0 else None,
            one.expert if one.expert >= 0 else None, 1e3 * one.begin, 1e3 * one.end,
        )
        for one in token_events(found.setting, found.served, at=at)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=_EVENTS, orient="row")
