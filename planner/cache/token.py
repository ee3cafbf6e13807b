"""One token on the clock: what the device, the link and the CPU do from its first layer to its last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moescope.errors import PlanError
from planner.cache.setting import Setting
from planner.cache.ways import Served
from planner.simulate.timeline import copy_size

Lane = Literal["device", "link", "cpu"]
Kind = Literal["dense", "hit", "load", "loaded", "cpu", "tail"]
"""``dense``: what comes before a layer's experts; ``hit``: an expert that was there runs; ``load``: a copy over the
link; ``loaded``: an expert that was copied runs; ``cpu``: the CPU runs one; ``tail``: what comes after all layers."""


@dataclass(frozen=True)
class Event:
    """Something that takes time.

    Attributes:
        lane: what is busy.
        kind: with what.
        layer: place of the MoE layer, from 0; -1 behind the last.
        expert: -1 where it is none.
        begin: seconds since the pass began; end: likewise.
    """

    lane: Lane
    kind: Kind
    layer: int
    expert: int
    begin: float
    end: float


def token_events(setting: Setting, served: Served, *, at: int, overlap: bool = True) -> list[Event]:
    """The events of one pass, layer by layer; the last end is the pass's time in ``served.clock``.

    The rules are those of :func:`planner.simulate.timeline.timeline` with ``fallback`` ``link`` or ``cpu``: copies come
    one after another in the order of gate weight, experts that are there run first, and the next layer begins when the
    last expert is done.

    Args:
        setting: model, machine and requests.
        served: of one of its ways, without prefetching, and with nothing on disk.
        at: number of the pass among those for judging.
        overlap: experts that are there run while others come.

    Raises:
        PlanError: no such pass, or a way with prefetching, whose copies belong to several passes.
    """
    if served.there is None or served.way.prefetch != "none":
        raise PlanError(f"{served.way.title}: copies of other tokens run beside; take a way without prefetching")
    if not 0 <= at < setting.test.num_passes:
        raise PlanError(f"no token {at}: there are {setting.test.num_passes}, counted from 0")
    return list(_events(setting, served, at, overlap))


def _events(setting: Setting, served: Served, at: int, overlap: bool) -> Iterator[Event]:
    assert served.there is not None
    work, costs = setting.test, served.costs
    shape = (work.num_layers, work.num_passes)
    dense, expert = np.broadcast_to(costs.dense, shape)[:, at], np.broadcast_to(costs.expert, shape)[:, at]
    cpu = np.broadcast_to(0.0 if costs.cpu is None else costs.cpu, shape)[:, at]
    link = setting.machine.link
    copies = [link.seconds(size) for size in copy_size(work, costs).tolist()]
    now = 0.0
    for layer in range(work.num_layers):
        answered = now + float(dense[layer])
        yield Event("device", "dense", layer, -1, now, answered)
        ids, there = work.ids[layer, at], served.there[layer, at]
        hits = [int(one) for one in ids[(ids >= 0) & there]]
        misses = [int(one) for one in ids[(ids >= 0) & ~there]]
        run, copy, host = float(expert[layer]), copies[layer], float(cpu[layer])
        found = _on_cpu(hits, misses, run, host) if served.way.misses == "cpu" else (
            _on_link(hits, misses, run, copy, overlap)
        )  # fmt: skip
        now = answered
        for lane, kind, one, begin, end in found:
            yield Event(lane, kind, layer, one, answered + begin, answered + end)
            now = max(now, answered + end)
    yield Event("device", "tail", -1, -1, now, now + float(np.broadcast_to(costs.tail, shape[1:])[at]))


_Part = tuple[Lane, Kind, int, float, float]
"""Lane, kind, expert, begin and end in seconds since the router's answer."""


def _on_link(hits: list[int], misses: list[int], run: float, copy: float, overlap: bool) -> Iterator[_Part]:
    device = link = 0.0
    for one in misses:
        yield "link", "load", one, link, link + copy
        link += copy
    arrived = [(number + 1) * copy for number in range(len(misses))]
    device = 0.0 if overlap or not misses else arrived[-1]
    for one in hits:
        yield "device", "hit", one, device, device + run
        device += run
    for one, there in zip(misses, arrived, strict=True):
        device = max(device, there)
        yield "device", "loaded", one, device, device + run
        device += run


def _on_cpu(hits: list[int], misses: list[int], run: float, host: float) -> Iterator[_Part]:
    for number, one in enumerate(hits):
        yield "device", "hit", one, number * run, (number + 1) * run
    for number, one in enumerate(misses):
        yield "cpu", "cpu", one, number * host, (number + 1) * host
