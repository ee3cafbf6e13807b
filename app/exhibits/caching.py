"""Exhibits of the page Cache: times by memory, ways to serve, hit rates and what they are made of, and domains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import store
from app.exhibits.absent import require
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.exhibits.listed import domains_of
from app.figures import caching as figures
from app.figures import caching_ways
from app.figures.style import Theme
from app.frames import caching as frames_of
from app.markdown import plain
from app.text import size
from moescope.errors import PlanError
from planner.cache.setting import CONTEXT
from planner.cache.study import Study
from planner.machines import machine as machine_named

MACHINE = "rtx4090"
"""The machine where nobody names one."""
GIB = 2**30


def asked(
    run: store.Run,
    *,
    frames: Frames = fresh,
    machine: str = MACHINE,
    memory: float | None = None,
    link: str | None = None,
    host_memory: float | None = None,
    disk: str | None = None,
    bits: int | None = None,
    context: int = CONTEXT,
    sequences: int = 1,
    chunk: int = 1,
    phase: str | None = None,
    domains: str | None = None,
    other_weights: float | None = None,
) -> dict[str, Any]:
    """The choices of these exhibits as :func:`app.frames.caching.answer` takes them.

    Args:
        run: a run.
        frames: where the size of half of the experts comes from.
        machine: a name, or the path of a file of ``moescope measure-device``.
        memory: GiB of the device; None = what holds half of the experts, where the machine has as much.
        link: another than the machine's; likewise disk, and host_memory in GiB.
        bits: of all experts; None = as they are.
        context: tokens whose keys and values are kept, per sequence.
        sequences: decoded together.
        chunk: tokens of a prompt that one pass reads; 1 = tokens one after another.
        phase: which tokens are replayed; None = all.
        domains: comma list of those whose text counts; None = all.
        other_weights: GiB beside the experts, where the model's configuration does not say.

    Raises:
        InputError: no such machine, link, disk or domain.
        PlanError: no such widths, or a model that the planner does not know.
    """
    serving = {
        "context": context, "batch": sequences, "bits": bits,
        "other_weights": None if other_weights is None else int(other_weights * GIB),
    }  # fmt: skip
    serving = {name: value for name, value in serving.items() if value is not None}
    if memory is None:
        most = frames_of.on_machine(machine).vram
        memory = float(f"{min(frames(frames_of.half, run, **serving), most) / GIB:.4g}")
    found: dict[str, Any] = {"name": machine, "vram": int(memory * GIB), **serving}
    more = {
        "link": link, "ram": None if host_memory is None else int(host_memory * GIB), "disk": disk,
        "chunk": None if chunk == 1 else chunk, "phase": phase, "domains": domains_of(run, domains),
    }  # fmt: skip
    return found | {name: value for name, value in more.items() if value is not None}


def _of_study(draw: Callable[[Study, Theme], Exhibit]) -> Callable[..., Exhibit]:
    """An exhibit of a study: what it can be told is the same for all of them, see :func:`asked`."""

    def make(
        run: store.Run,
        *,
        frames: Frames = fresh,
        theme: Theme = "light",
        machine: str = MACHINE,
        memory: float | None = None,
        link: str | None = None,
        host_memory: float | None = None,
        disk: str | None = None,
        bits: int | None = None,
        context: int = CONTEXT,
        sequences: int = 1,
        chunk: int = 1,
        phase: str | None = None,
        domains: str | None = None,
        other_weights: float | None = None,
    ) -> Exhibit:
        require_order(run)
        machine_named(**frames_of.where(machine), link=link, disk=disk)  # what is no machine is no matter of the run
        try:
            if other_weights is None and not frames(frames_of.knows_the_rest, run):
                raise Absent(
                    "The run does not say how large its model is beside the experts: choose other_weights, in GiB."
                )
            wanted = asked(
                run, frames=frames, machine=machine, memory=memory, link=link, host_memory=host_memory, disk=disk,
                bits=bits, context=context, sequences=sequences, chunk=chunk, phase=phase, domains=domains,
                other_weights=other_weights,
            )  # fmt: skip
            return draw(frames(frames_of.answer, run, **wanted), theme)
        except PlanError as error:
            raise Absent(f"Caches cannot be replayed so: {error}") from error

    make.__name__, make.__qualname__, make.__doc__ = draw.__name__, draw.__qualname__, draw.__doc__
    return make


def require_order(run: store.Run) -> None:
    """Refuse runs that hold no order of tokens, or not all of it yet.

    Raises:
        Absent: with the reason.
    """
    if run.live:
        raise Absent("Caches are replayed on the whole trace: this can be answered when the collection ends.")
    require("What a cache would do", run, "trace", "order")


@_of_study
def speed(found: Study, theme: Theme) -> Exhibit:
    """How long a token takes with which memory."""
    frame = frames_of.times(found)
    return Exhibit(
        figure=figures.time_by_memory(
            frame, asked=found.slots * found.memory["slot"], resident=found.resident_ms, theme=theme
        ),
        frame=frame,
        read="Lower is faster; the dashed upright is this memory. Caching pays where the thick line, with all of its "
        "band, lies a tenth below the two that it is held against: whole layers, and the same way on random experts. "
        "Hover names the way; below the bound nothing can lie.",
        rests_on=f"{found.tokens:,} tokens of {found.requests:,} requests; the band is a 95 % interval over requests.",
        alt="Milliseconds per token against memory for experts: best way, whole layers, random experts, bound",
    )


@_of_study
def ways(found: Study, theme: Theme) -> Exhibit:
    """Every way to serve with one memory."""
    frame = frames_of.ways(found)
    return Exhibit(
        figure=caching_ways.ways(frame, bound=found.bound_ms, theme=theme),
        frame=frame,
        read="Shorter is faster. A way that goes by the trace is worth its trouble where its bar ends before its "
        "diamond and before the bars that need no trace; nothing can be faster than the bound.",
        rests_on=f"{size(found.slots * found.memory['slot'])} for experts; intervals are 95 % over requests.",
        alt="Bars: milliseconds per token of every way to serve with this memory",
    )


@_of_study
def hits(found: Study, theme: Theme) -> Exhibit:
    """Hit rate by slots per layer: policies, bounds and controls."""
    frame = frames_of.hit_rates(found)
    return Exhibit(
        figure=figures.hit_rate_curves(frame, each=found.slots / found.layers, theme=theme),
        frame=frame,
        read="The dashed upright is this memory. What LRU hits beyond its grey lines is order in the text: within "
        "requests, or over all. Bounds know the future; no policy lies above the highest, which need not keep what it "
        "loads; whole sets: all of a token's experts must be there together.",
        rests_on=f"Each layer has a cache of its own; {found.tokens:,} tokens; bands are 95 % intervals over requests.",
        alt="Hit rate against slots per layer: policies, bounds and controls",
    )


@_of_study
def parts(found: Study, theme: Theme) -> Exhibit:
    """What the hit rate is made of: chance, popularity, topic, locality."""
    frame = frames_of.parts(found)
    return Exhibit(
        figure=figures.hit_rate_parts(frame, each=max(found.slots // found.layers, 1), theme=theme),
        frame=frame,
        read="Random: what any cache of this size hits. Popularity: some experts are used more by all text. Topic: a "
        "request uses some more. Locality: neighbouring tokens use the same. A static set can only win popularity.",
        rests_on="In points of the hit rate; a part may be negative.",
        alt="Stacked bars: hit rate of LRU and of a static set by cause",
    )


@_of_study
def domain_times(found: Study, theme: Theme) -> Exhibit:
    """Time per token of the best way, by domain."""
    frame = frames_of.domains(found)
    return Exhibit(
        figure=caching_ways.domain_times(frame, theme=theme),
        frame=frame,
        read="The top bar is what the least fortunate text gets.",
        rests_on=_best_traced(found),
        alt="Bars: milliseconds per token by domain",
    )


@_of_study
def domain_hits(found: Study, theme: Theme) -> Exhibit:
    """Hit rate of the best way by domain, among the others and alone."""
    frame = frames_of.domains(found)
    return Exhibit(
        figure=caching_ways.domain_hits(frame, theme=theme),
        frame=frame,
        read="A diamond to the right of its dot: the domain loses by being served among others.",
        rests_on=_best_traced(found),
        alt="Dots: hit rate by domain, among the others and alone",
    )


def _best_traced(found: Study) -> str:
    best = next((way.title for way in found.ways if way.needs_trace), "")
    return f"{plain(best, 120)}; the slowest on top."


EXHIBITS = (
    Entry("caching-speed", speed, "Time per token by memory for experts", page="cache", report=False),
    Entry("caching-ways", ways, "Ways to serve with one memory", page="cache", report=False),
    Entry("caching-hits", hits, "Hit rate by slots per layer", page="cache", report=False),
    Entry("caching-parts", parts, "What the hit rate is made of", page="cache", report=False),
    Entry("caching-domain-times", domain_times, "Time per token by domain", page="cache", report=False),
    Entry("caching-domain-hits", domain_hits, "Hit rate by domain", page="cache", report=False),
)
