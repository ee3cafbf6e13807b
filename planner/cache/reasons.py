"""Why caching pays or not, beside times: where hits come from, consistency, the link, prefetching, the cliff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moescope.sizes import size
from planner.cache.published import RATIO, SEGMENT, Place
from planner.cache.setting import Setting
from planner.cache.study import WayFigures
from planner.simulate.cliff import cliff
from planner.simulate.curves import curve

HARDLY = 0.97
"""Part of the time without prefetching from which on prefetching is said not to pay; ours."""


def reasons(
    setting: Setting,
    *,
    slots: int,
    each: int,
    parts: Mapping[str, float],
    srp: Place | None,
    sch: Place | None,
    ways: Sequence[WayFigures],
) -> list[str]:
    """Sentences, the most telling first.

    Args:
        setting: model, machine and requests.
        slots: experts that the device holds.
        each: of which per layer, where all layers have as many.
        parts: what the hit rate of LRU is made of there.
        srp: of the run among published models; None = not known.
        sch: likewise.
        ways: what was timed.
    """
    told = [_where_from(parts, each)] if slots >= setting.least_slots else []
    return [*told, *_published(srp, sch), _link(setting), *_prefetching(ways), *_cliff(setting, slots)]


def _published(srp: Place | None, sch: Place | None) -> list[str]:
    """Beside published models, of which number 1 is the most consistent."""
    told = []
    if srp is not None:
        told.append(
            f"SRP over {SEGMENT} tokens is {srp[0]:.1%}, number {srp[1]} beside {srp[2]} figures of published models"
        )
    if sch is not None:
        told.append(
            f"SCH of a shared cache of {RATIO:g} times what a token uses {sch[0]:.1%}, number {sch[1]} beside {sch[2]}"
        )
    return [f"{'; '.join(told)} (number 1 is the most consistent)."] if told else []


def _where_from(parts: Mapping[str, float], each: int) -> str:
    random, popularity, topic, locality = (
        _points(parts[name]) for name in ("random", "popularity", "topic", "locality")
    )
    return (
        f"LRU caches of {each} {'expert' if each == 1 else 'experts'} per layer hit {sum(parts.values()):.0%}: random"
        f" experts would give {random} percentage points of that, experts that all text uses add {popularity}, topics"
        f" of requests {topic}, and neighbouring tokens {locality}."
    )


def _points(part: float) -> str:
    words = f"{100 * part:.0f}"
    return "0" if words == "-0" else words


def _link(setting: Setting) -> str:
    machine, costs = setting.machine, setting.test_costs
    load, run = 1e3 * machine.link.seconds(setting.slot_bytes), 1e3 * float(np.mean(costs.expert))
    cpu = "" if costs.cpu is None else f" and {1e3 * float(np.mean(costs.cpu)):.3g} on the CPU"
    return (
        f"An expert of {size(setting.slot_bytes)} takes {load:.3g} ms over {machine.link.name}, {run:.3g} ms to run on"
        f" the device{cpu}."
    )


def _prefetching(ways: Sequence[WayFigures]) -> list[str]:
    plain = next((one for one in ways if one.name == "lru"), None)
    foreseen = [one for one in ways if one.name.startswith("lru+")]
    if plain is None or not foreseen:
        return []
    best = min(foreseen, key=lambda one: one.ms)
    word = "gains a little"
    if best.ms > HARDLY * plain.ms:
        word = "does not pay"
    elif best.high < plain.low:
        word = "pays"
    return [f"Prefetching {word}: {best.title}, {best.ms:.3g} ms per token against {plain.ms:.3g} without."]


def _cliff(setting: Setting, slots: int) -> list[str]:
    work = setting.test
    found = cliff(
        work, shared=curve(work, policy="lru", shared=True, overflow=True),
        per_layer=curve(work, policy="lru", overflow=True),
    )  # fmt: skip
    if slots >= found.cycle:
        return []
    return [
        f"One pass uses {found.cycle} experts over all layers and the device holds {slots}: a cache that all layers"
        f" share forgets most of them before they are needed again ({found.before:.0%} hits)."
    ]
