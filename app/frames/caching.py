"""Whether caching experts pays on a machine: the study as tables, and the clock of single tokens."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

import planner
import store
from app.text import from_here, size
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.cache.chosen import chosen_plan
from planner.cache.study import Study, WayFigures
from planner.cache.ways import WAYS
from planner.caching import study
from planner.estimate.dense import dense_part
from planner.estimate.memory import activation_bytes, expert_sizes, kv_bytes
from planner.machine import Machine
from planner.machines import machine
from planner.source import source_of, value_bytes

BITS = (8, 4, 3, 2)
"""Widths that the page offers beside the weights as they are."""

_ROOM = 16

SHORT = {
    "layers_cpu": "whole layers, CPU", "layers_load": "whole layers, streamed", "static_cpu": "most used, CPU",
    "lru": "LRU", "lru_split": "LRU, fitted sizes", "lfu": "LFU", "half_pinned": "half pinned, LRU",
    "lru_shared": "LRU, shared", "resident": "all on the device",
}  # fmt: skip
"""Ways to serve in the few words that an axis has room for; those with prefetching are put together."""

_CURVE = {
    "policy": pl.String, "control": pl.String, "slots": pl.Int32, "rate": pl.Float64, "low": pl.Float64,
    "high": pl.Float64,
}  # fmt: skip
_PARTS = {"policy": pl.String, "part": pl.String, "points": pl.Float64}
_TIMES = {
    "bytes": pl.Int64, "slots": pl.Int32, "way": pl.String, "ms": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "plain": pl.Float64, "chance": pl.Float64, "bound": pl.Float64, "without": pl.Float64, "pays": pl.Boolean,
}  # fmt: skip
_WAYS = {
    "name": pl.String, "short": pl.String, "title": pl.String, "needs_trace": pl.Boolean, "hit_rate": pl.Float64,
    "hit_low": pl.Float64, "hit_high": pl.Float64, "ms": pl.Float64, "low": pl.Float64, "high": pl.Float64,
    "p95_ms": pl.Float64, "stalled": pl.Float64, "mb_per_token": pl.Float64, "wasted_mb": pl.Float64,
    "chance_ms": pl.Float64, "layer_slots": pl.String,
}  # fmt: skip
_DOMAINS = {
    "domain": pl.String, "tokens": pl.Int64, "hit_rate": pl.Float64, "ms": pl.Float64, "alone": pl.Float64
}  # fmt: skip


def where(name: str) -> dict[str, Any]:
    """A machine as ``planner.machines.machine`` is told it: by its name, or as the path of a file."""
    return {"file" if Path(name).suffix == ".json" or "/" in name else "name": name}


def on_machine(
    name: str, *, vram: int | None = None, ram: int | None = None, link: str | None = None, disk: str | None = None
) -> Machine:
    """A preset, or the machine of a file, with other memory, link and disk where they are given.

    Raises:
        PlanError: there is none.
    """
    return machine(vram=vram, ram=ram, link=link, disk=disk, **where(name))


def knows_the_rest(run: store.Run) -> bool:
    """Whether the configuration says what the model has beside its experts."""
    try:
        dense_part(run.info.model_config, source_of(run))
    except PlanError:
        return False
    return True


def half(run: store.Run, *, context: int, batch: int, bits: int | None = None, other_weights: int | None = None) -> int:
    """Bytes of a device that holds half of the experts beside everything else.

    Args:
        run: a finished run.
        context: tokens whose keys and values are kept, per sequence.
        batch: sequences decoded together.
        bits: of the experts' weights; None = as they are.
        other_weights: bytes beside the experts, where the configuration does not say.

    Raises:
        PlanError: no such widths, or a model that the planner does not know.
    """
    source, narrow = source_of(run), narrowed(run, bits)
    weight = value_bytes(run) or 2.0
    experts = expert_sizes(narrow or source, source_bits=8.0 * weight).total / 2
    if other_weights is not None:
        return int(experts + other_weights)
    rest = dense_part(run.info.model_config, source)
    kept = kv_bytes(rest, context=context, batch=batch)
    return int(
        experts + rest.parameters * weight + kept + activation_bytes(rest, source, tokens=batch, sequences=batch)
    )


def answer(run: store.Run, *, name: str, bits: int | None = None, **asked: Any) -> Study:
    """Whether caching pays, with all that it rests on; some seconds.

    Args:
        run: with a trace.
        name: of a preset of machines, or the path of a machine's file.
        bits: of the experts' weights; None = as they are.
        asked: vram, ram, link, disk: what the machine has instead; context, batch, chunk, phase, domains,
            other_weights: as :func:`planner.caching.study`.

    Raises:
        PlanError: as there; no plan of such widths.
    """
    machine, serving = split(name, asked)
    return study(run, machine, plan=narrowed(run, bits), **serving)


def split(name: str, asked: Mapping[str, Any]) -> tuple[Machine, dict[str, Any]]:
    """The machine that is asked for, and how it serves, without what nobody said."""
    said = given(asked)
    parts = {part: said.pop(part) for part in ("vram", "ram", "link", "disk") if part in said}
    return on_machine(name, **parts), said


def narrowed(run: store.Run, bits: int | None) -> Plan | None:
    """The plan that makes all experts so wide; None = as they are."""
    if bits is None:
        return None
    # bits are what a weight may take with its scales: with room for them, the width is the one asked for
    return planner.make(run, preset="uniform_bits", bits=_ROOM, widths=[bits], allow_invalid=True)


def plan(run: store.Run, *, way: str, name: str, bits: int | None = None, **asked: Any) -> Plan:
    """One way of :func:`answer` as a plan that engines' files are written from; a second or two.

    Raises:
        PlanError: as :func:`answer`.
    """
    machine, serving = split(name, asked)
    return chosen_plan(run, machine, way=way, bits=bits, allow_invalid=True, **serving)


def commands(run: store.Run, *, name: str, bits: int | None = None, **asked: Any) -> str:
    """What gives the same study in a terminal, and a plan for an engine."""
    words = [f"--machine {shlex.quote(name)}"]
    options = ("vram", "ram", "link", "disk", "context", "batch", "chunk", "phase")
    words += [f"--{option} {asked[option]}" for option in options if asked.get(option) is not None]
    if asked.get("domains"):
        words.append(f"--domains {shlex.quote(','.join(asked['domains']))}")
    if asked.get("other_weights") is not None:
        words.append(f"--other-weights {asked['other_weights']}")
    words += ["--allow-invalid"] if run.badge.status == "invalid" else []
    target = shlex.quote(from_here(run.path))
    narrow = []
    if bits is not None:
        narrow = [f"moescope plan {target} --preset uniform_bits --bits {_ROOM} --set widths=[{bits}] -o narrow.json"]
        words.append("--plan narrow.json")
    return "\n".join((
        *narrow, f"moescope cache {target} {' '.join(words)}",
        "moescope export plan.json --to ENGINE -o FILE    # plan.json: Download JSON, above; --list names the engines",
    ))  # fmt: skip


def given(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Without what nobody said."""
    return {name: value for name, value in asked.items() if value is not None}


# --- tables ---


def hit_rates(found: Study) -> pl.DataFrame:
    """Hit rate by policy, control and slots per layer; low, high: 95 % interval over requests, where there is one."""
    return _table([asdict(one) for one in found.curves], _CURVE)


def parts(found: Study) -> pl.DataFrame:
    """What the hit rate of each policy at the size asked for is made of, in points of 0..1."""
    rows = [
        {"policy": policy, "part": name, "points": value}
        for policy, made in found.parts.items() for name, value in made.items()
    ]  # fmt: skip
    return _table(rows, _PARTS)


def times(found: Study) -> pl.DataFrame:
    """ms per token by bytes for experts, ascending. way, ms, low, high: the best that goes by the trace; plain: whole
    layers on the device; chance: the way on random experts; without: the faster of both; bound: what nothing can beat;
    pays: whether caching does."""
    rows = [{**asdict(one), "without": one.without, "pays": one.pays} for one in found.points]
    return _table(rows, _TIMES)


def ways(found: Study) -> pl.DataFrame:
    """One row per way at the size asked for, the fastest first.

    hit_low, hit_high, low, high: 95 % intervals over requests; mb_per_token, wasted_mb: 10^6 bytes over the link, and
    those of them that were prefetched in vain; chance_ms: the same way on random experts.
    """
    rows = [
        {
            **asdict(one), "short": short(one), "mb_per_token": one.loads_per_token / 1e6,
            "wasted_mb": one.wasted_per_token / 1e6, "layer_slots": ", ".join(map(str, one.layer_slots)),
        }
        for one in found.ways
    ]  # fmt: skip
    return _table(rows, _WAYS)


def domains(found: Study) -> pl.DataFrame:
    """The best way that goes by the trace, by domain, the slowest first; alone: hit rate where nothing else
    is served."""
    return _table([asdict(one) for one in found.domains], _DOMAINS)


def memory(found: Study) -> dict[str, float]:
    """Bytes of the device by use: other weights, keys and values, activations, experts; they sum to its memory."""
    return {name: found.memory[name] for name in ("other", "kv", "activations", "experts")}


def short(way: WayFigures) -> str:
    """The way in the few words that an axis has room for."""
    if way.name.startswith("lru+"):
        return f"LRU + {way.name.removeprefix('lru+').replace('_', ' ')}"
    return SHORT.get(way.name, way.name)


def told(found: Study) -> pl.DataFrame:
    """The ways as they are printed: intervals in words, the fastest first."""
    rows = [
        {
            "way": short(one), "ms per token": f"{one.ms:.3g} ({one.low:.3g} to {one.high:.3g})",
            "p95 of a pass, ms": float(f"{one.p95_ms:.3g}"),
            "hits": f"{one.hit_rate:.1%}", "stalled": f"{one.stalled:.0%}",
            "loaded per token": size(one.loads_per_token),
            "random experts": None if one.chance_ms is None else float(f"{one.chance_ms:.3g}"),
            "by the trace": "yes" if one.needs_trace else "no",
        }
        for one in found.ways
    ]  # fmt: skip
    return pl.DataFrame(rows)


def told_times(found: Study) -> pl.DataFrame:
    """The sizes as they are printed."""
    names = {way.title: SHORT[way.name] for way in WAYS}
    rows = [
        {
            "for experts": size(one.bytes), "slots": one.slots, "best by the trace": names.get(one.way, one.way),
            "ms per token": f"{one.ms:.3g} ({one.low:.3g} to {one.high:.3g})",
            "whole layers": float(f"{one.plain:.3g}"), "random experts": float(f"{one.chance:.3g}"),
            "bound": float(f"{one.bound:.3g}"), "pays": "yes" if one.pays else "no",
        }
        for one in found.points
    ]  # fmt: skip
    return pl.DataFrame(rows)


def told_domains(found: Study) -> pl.DataFrame:
    """The domains as they are printed."""
    rows = [
        {
            "domain": one.domain, "tokens": one.tokens, "ms per token": float(f"{one.ms:.3g}"),
            "hits": f"{one.hit_rate:.1%}", "hits, served alone": f"{one.alone:.1%}",
        }
        for one in found.domains
    ]  # fmt: skip
    return pl.DataFrame(rows)


def _table(rows: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([{name: row[name] for name in schema} for row in rows], schema=schema)
