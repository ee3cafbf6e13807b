"""A placement of a run's experts on devices, what it is worth, and the frames that the page and the command show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

import store
from app.frames.axes import layer_label
from compressor.plan import Plan
from moescope.cluster import Cluster
from planner.entry import domains_of
from planner.place.methods import METHODS, Method
from planner.place.passes import Passes, passes
from planner.place.score import Score, balancedness
from planner.place.slots import Placement, check_slots, contiguous
from planner.place.stream import chance
from planner.place.verdict import Verdict, saved, verdict
from planner.placing import BATCH, expert_bytes, place, placeable, placement_of, text_of
from profiler.metrics._arrays import FloatArray

WORDS = {
    "before": "as experts lie",
    "after": "this placement",
    "packed": "LPT with swaps, no replicas",
    "best": "LPT on the later text itself",
    "chance": "uniformly random experts",
}
"""Placements beside each other, in the order in which they are shown."""

BINS = 50
"""Of balancedness, 0 to 1."""


@dataclass(frozen=True)
class Placed:
    """A plan with all that is shown of it.

    Attributes:
        plan: the placement, as engines are told it.
        placement: the same, as slots.
        first: as experts lie at first, with no replicas where slots can be divided without.
        start: contiguous, with as many slots as the placement.
        load: (layers, E) tokens of each expert in the text that it was made from.
        verdict: on later text; None of a run that holds counts alone.
        passes: forward passes of later text, by names of :data:`WORDS`; empty likewise.
        expert_bytes: of one expert; 0 = not known.
        batch: requests that are decoded together.
        read: tokens of the run that were read; None = all.
    """

    plan: Plan
    placement: Placement
    first: Placement
    start: Placement
    load: FloatArray
    verdict: Verdict | None
    passes: dict[str, Passes]
    expert_bytes: int
    batch: int
    read: int | None = None

    @property
    def labels(self) -> list[str]:
        """Names of the layers."""
        return [layer_label(one.layer, one.step) for one in self.plan.source.layers]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan says of itself, in sentences."""
        return self.plan.evidence[0].notes

    @property
    def replicas(self) -> int:
        """Slots of a layer beyond one per expert."""
        return self.placement.slots - self.placement.num_experts


def placed(
    run: store.Run, *, devices: int, nodes: int = 1, batch: int = BATCH, train_part: float = 0.5,
    max_tokens: int | None = None, options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = (),
    cluster: Cluster | None = None, tell: Callable[[str], None] | None = None, **asked: Any,
) -> Placed:  # fmt: skip
    """Place, and score the placement on the text that it was not made from.

    Args:
        run: a finished run.
        devices: of the group.
        nodes: among which they are divided evenly.
        batch: requests that are decoded together.
        train_part: of the requests, what the placement is made from.
        max_tokens: of the trace at most; None = all.
        options: of the method.
        cluster: whose workers read the trace; None = this process.
        tell: told how far it is.
        asked: other arguments of ``planner.placing.place``.

    Raises:
        PlanError: what cannot be, with what would do.
    """
    common: dict[str, Any] = {"batch": batch, "train_part": train_part, "max_tokens": max_tokens}
    source = placeable(run, allow_invalid=asked.get("allow_invalid", False))
    domains = domains_of(run, asked.get("domains"))
    held = source.layers[0].num_experts
    check_slots(held + asked.get("redundant", 0), held, devices, nodes)  # before the text is read
    text = text_of(
        run, source, domains=domains, train_part=train_part, max_tokens=max_tokens, cluster=cluster, tell=tell
    )
    common["text"] = text
    plan = place(run, devices=devices, nodes=nodes, **common, **asked, **dict(options))
    placement = placement_of(plan)
    layers, experts = text.load.shape
    spare = 0 if experts % devices == 0 else placement.slots - experts
    shape: dict[str, Any] = {"num_layers": layers, "num_experts": experts, "devices": devices, "nodes": nodes}
    first = contiguous(**shape, slots=experts + spare)
    by_pass = {}
    if text.later is not None:
        works = {"before": (text.later, first), "after": (text.later, placement),
                 "chance": (chance(text.later), placement)}  # fmt: skip
        by_pass = {name: passes(*both, batch=batch) for name, both in works.items()}
    cut = max_tokens is not None and text.later is not None and run.info.tokens > max_tokens
    return Placed(
        plan=plan, placement=placement, first=first, start=contiguous(**shape, slots=placement.slots),
        load=text.load.astype(np.float64), verdict=None if text.later is None else verdict(run, plan, **common),
        passes=by_pass, expert_bytes=expert_bytes(run, plan.source), batch=batch, read=max_tokens if cut else None,
    )  # fmt: skip


def scores(found: Placed) -> dict[str, Score]:
    """Scores on later text by names of :data:`WORDS`; empty where there is no trace."""
    return {} if found.verdict is None else {name: getattr(found.verdict, name) for name in WORDS}


def comparison(found: Placed) -> pl.DataFrame:
    """One row per placement beside each other; without a trace, ``before`` and ``after`` on the counts.

    Columns: name (of ``WORDS``), placement; balancedness per window and per pass, 0..1; saved = part of the busiest
    devices' work that is saved against ``before``; devices and nodes per token and layer; copies = devices other than
    its home that a token is sent to; remote = share of token-expert pairs that leave the home device; moves = share of
    pairs of adjacent layers' experts that lie on different devices. Null = not known.
    """
    rows: list[tuple[str | float | None, ...]] = []
    for name, one in scores(found).items():
        before = found.verdict.before if found.verdict is not None and name != "chance" else None
        rows.append(
            (name, WORDS[name], one.mean_balancedness, one.pass_balancedness,
             None if before is None else saved(before, one), one.mean_fan_out, one.mean_node_fan_out,
             one.copies_per_token, one.remote_share, one.move_share)
        )  # fmt: skip
    if found.verdict is None:
        for name, load in _relative_counts(found).items():
            rows.append((name, WORDS[name], float(np.nanmean(balancedness(load))), *(None,) * 7))
    names = ("balancedness", "per_pass", "saved", "devices", "nodes", "copies", "remote", "moves")
    schema = {"name": pl.String, "placement": pl.String, **dict.fromkeys(names, pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)


def device_loads(found: Placed) -> pl.DataFrame:
    """One row per placement (before, after), layer and device: label, device, load in pairs, relative = load over the
    mean of the layer (1 = all devices carry as much; null without load). Without a trace, of the counts."""
    if found.verdict is None:
        tables = _relative_counts(found)
    else:
        tables = {name: getattr(found.verdict, name).load.sum(axis=0).astype(float) for name in ("before", "after")}
    rows = []
    for name, load in tables.items():
        mean = load.mean(axis=-1, keepdims=True)
        relative = np.divide(load, mean, out=np.full_like(load, np.nan), where=mean > 0)
        rows += [
            (name, label, device, float(load[layer, device]), float(relative[layer, device]))
            for layer, label in enumerate(found.labels)
            for device in range(load.shape[-1])
        ]
    schema = {"name": pl.String, "label": pl.String, "device": pl.Int32, "load": pl.Float64, "relative": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)


def layers(found: Placed) -> pl.DataFrame:
    """One row per placement and layer.

    Columns: name, label; balancedness = mean of the windows of later text, low and high = their extremes; per_pass;
    remote and devices as in :func:`comparison`. Without a trace, before and after on the counts, others null.
    """
    rows = []
    for name, one in scores(found).items():
        windows, by_pass = one.balancedness(), one.pass_balancedness_of_layers()
        for layer, label in enumerate(found.labels):
            mine = windows[:, layer][~np.isnan(windows[:, layer])]
            spread = (float(mine.mean()), float(mine.min()), float(mine.max())) if len(mine) else (None,) * 3
            pairs, tokens = int(one.pass_pairs[layer]), int(one.tokens[layer])
            remote = int(one.remote_pairs[layer]) / pairs if pairs else None
            fan_out = int(one.fan_out[layer]) / tokens if tokens else None
            rows.append((name, label, *spread, float(by_pass[layer]), remote, fan_out))
    if found.verdict is None:
        for name, load in _relative_counts(found).items():
            for label, value in zip(found.labels, balancedness(load), strict=True):
                rows.append((name, label, float(value), float(value), float(value), None, None, None))
    names = ("balancedness", "low", "high", "per_pass", "remote", "devices")
    schema = {"name": pl.String, "label": pl.String, **dict.fromkeys(names, pl.Float64)}
    return pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)


def moves(found: Placed) -> pl.DataFrame:
    """One row per placement (before, after, chance) and pair of adjacent layers: name, label ("0 → 1"), moves = share
    of pairs of their experts that one token uses and that lie on different devices."""
    names = [f"{one} → {other}" for one, other in zip(found.labels[:-1], found.labels[1:], strict=True)]
    rows = [
        (name, label, int(moved) / int(pairs) if pairs else None)
        for name, one in scores(found).items()
        if name in ("before", "after", "chance")
        for label, moved, pairs in zip(names, one.moves, one.adjacent, strict=True)
    ]
    return pl.DataFrame(rows, schema={"name": pl.String, "label": pl.String, "moves": pl.Float64}, orient="row")


def by_pass(found: Placed) -> pl.DataFrame:
    """How passes spread: one row per placement and bin of balancedness: name, low, high, passes, share of all."""
    rows = []
    for name, one in found.passes.items():
        values = one.balancedness()
        values = values[~np.isnan(values)]
        counts, edges = np.histogram(values, bins=BINS, range=(0.0, 1.0))
        for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            rows.append((name, low, high, count, count / len(values) if len(values) else 0.0))
    schema = {"name": pl.String, "low": pl.Float64, "high": pl.Float64, "passes": pl.Int64, "share": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def by_size(found: Placed) -> pl.DataFrame:
    """Balancedness of passes by how many tokens run together: name, tokens, passes, balancedness (of their sums)."""
    frames = []
    for name, one in found.passes.items():
        table = pl.DataFrame({"tokens": one.tokens, "pairs": one.pairs, "largest": one.largest})
        summed = table.group_by("tokens").agg(pl.len().alias("passes"), pl.col("pairs", "largest").sum()).sort("tokens")
        value = pl.when(pl.col("largest") > 0).then(pl.col("pairs") / one.devices / pl.col("largest"))
        frames.append(summed.select(pl.lit(name).alias("name"), "tokens", "passes", value.alias("balancedness")))
    schema = {"name": pl.String, "tokens": pl.Int64, "passes": pl.UInt32, "balancedness": pl.Float64}
    return pl.concat(frames) if frames else pl.DataFrame(schema=schema)


def replicas(found: Placed) -> pl.DataFrame:
    """One row per layer and expert: label, expert, slots, devices = those that hold it, share = of the layer's tokens
    in the text of the fit."""
    slots, held = found.placement.counts(), (found.placement.copies() > 0).sum(axis=1)
    whole = np.maximum(found.load.sum(axis=1, keepdims=True), 1e-300)
    experts = found.placement.num_experts
    return pl.DataFrame(
        {
            "label": [label for label in found.labels for _ in range(experts)],
            "expert": np.tile(np.arange(experts, dtype=np.int32), len(found.labels)),
            "slots": slots.reshape(-1), "devices": held.reshape(-1), "share": (found.load / whole).reshape(-1),
        }
    )  # fmt: skip


def movement(found: Placed) -> pl.DataFrame:
    """One row per layer, against the contiguous map with as many slots: label; changed = slots with another expert;
    copied = experts that a device has to be sent; idle = slots whose expert their device has already; slots; bytes =
    copied in bytes (0 = an expert's are not known)."""
    changed = (found.placement.experts != found.start.experts).sum(axis=1)
    mine = found.placement.copies()
    copied = ((mine > 0) & (found.start.copies() == 0)).sum(axis=(1, 2))
    return pl.DataFrame(
        {
            "label": found.labels, "changed": changed, "copied": copied,
            "idle": np.maximum(mine - 1, 0).sum(axis=(1, 2)), "slots": np.full(len(changed), found.placement.slots),
            "bytes": copied * found.expert_bytes,
        }
    )  # fmt: skip


def domains(found: Placed) -> pl.DataFrame:
    """One row per domain: domain, tokens, balancedness per pass before and after, saved, worst = whether it is the one
    with the lowest ``after``."""
    told = found.verdict
    rows = []
    if told is not None:
        for name, after in told.domains.items():
            before = told.domains_before[name]
            rows.append(
                (name, int(after.tokens.max(initial=0)), before.pass_balancedness, after.pass_balancedness,
                 saved(before, after), name == told.worst_domain)
            )  # fmt: skip
    schema = {"domain": pl.String, "tokens": pl.Int64, "before": pl.Float64, "after": pl.Float64, "saved": pl.Float64,
              "worst": pl.Boolean}  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row").fill_nan(None)


def slots(found: Placed) -> pl.DataFrame:
    """One row per layer and device: label, device, node, experts = those in its slots, in order, as text."""
    step = found.placement.slots_per_device
    each = found.placement.devices // found.placement.nodes
    rows = [
        (label, device, device // each, " ".join(map(str, row[device * step : (device + 1) * step])))
        for label, row in zip(found.labels, found.placement.experts.tolist(), strict=True)
        for device in range(found.placement.devices)
    ]
    schema = {"label": pl.String, "device": pl.Int32, "node": pl.Int32, "experts": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def usable(run: store.Run) -> list[Method]:
    """The methods that a run's data suffices for, in their order."""
    return [one for one in METHODS if run.has_trace or not one.needs_trace]


def methods(run: store.Run | None = None) -> pl.DataFrame:
    """One row per method: method, title, source, redundant = takes redundant slots, needs; its options (* = a must);
    here = whether the run suffices, null without one."""
    rows = [
        (
            one.name, one.title, one.source, "yes" if one.replicates else "no",
            "trace" if one.needs_trace else "counts",
            ", ".join(f"{name}*" if name in one.required else name for name in one.options) or None,
            None if run is None else run.has_trace or not one.needs_trace,
        )
        for one in METHODS
    ]  # fmt: skip
    names = ("method", "title", "source", "redundant", "needs", "options")
    return pl.DataFrame(rows, schema={**dict.fromkeys(names, pl.String), "here": pl.Boolean}, orient="row")


def first_devices(run: store.Run) -> int:
    """Devices to show first: the most, up to 8, that the experts can be divided among."""
    experts = run.layers[0].num_experts if run.layers else 1
    return max((one for one in (8, 4, 2) if experts % one == 0 and one < experts), default=1)


def _relative_counts(found: Placed) -> dict[str, FloatArray]:
    """(layers, D) loads of the counts that it was made from: before, after."""
    return {"before": found.first.load(found.load), "after": found.placement.load(found.load)}
