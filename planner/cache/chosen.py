"""The plan of one way to serve, as it was chosen from a study: what exporters write files for engines from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast, get_args

import store
from compressor.plan import Bits, Plan, Prefetch
from moescope.errors import PlanError
from planner.cache.setting import setting_of
from planner.cache.trials import Trials, Widths
from planner.cache.ways import RESIDENT, Way, way_of
from planner.candidates import Request
from planner.machine import Machine


def chosen_plan(
    run: store.Run, machine: Machine, *, way: str, bits: int | None = None, allow_invalid: bool = False, **asked: Any
) -> Plan:
    """Where experts lie on a machine, layer by layer, and how wide they are, if all become alike.

    Args:
        run: with a trace.
        machine: as in the study.
        way: its name there; ``lru+transitions`` and the like are caches with prefetching.
        bits: of all experts; None = as they are.
        allow_invalid: take a run whose checks failed.
        asked: context, batch, other_weights, domains, phase, steps: as :func:`planner.cache.setting.setting_of`.

    Raises:
        PlanError: no such way, or one that the machine does not allow.
    """
    chosen = _way(way)
    setting = setting_of(run, machine, narrow=bits is not None, **asked)
    request = Request(run=run, memory=0, domains=asked.get("domains"), allow_invalid=allow_invalid)
    tried = Trials(setting, replace(request.task(), form="packed", bits=16.0))
    width = cast("Bits | None", bits)
    widths = Widths("as they are" if bits is None else f"in {bits} bits", width, width)
    if chosen is RESIDENT and not tried.all_fit(widths):
        raise PlanError(f"the experts {widths.words} do not all fit on the device: choose another way, or more memory")
    tried.take(chosen, widths)
    if not tried.offers:
        raise PlanError(next(iter(tried.refused.values()), f"{chosen.title}: the machine does not allow it"))
    return tried.offers[0].plan


def _way(name: str) -> Way:
    if name == RESIDENT.name:
        return RESIDENT
    cache, _, foreseen = name.partition("+")
    found = way_of(cache)
    if not foreseen:
        return found
    if foreseen not in get_args(Prefetch) or foreseen == "none" or not found.can_prefetch:
        raise PlanError(
            f"no way to serve {name!r}: LRU caches per layer alone prefetch, by {', '.join(get_args(Prefetch)[1:])}"
        )
    title = f"{found.title}, prefetching by {foreseen.replace('_', ' ')}"
    return replace(found, name=name, title=title, prefetch=cast("Prefetch", foreseen))
