"""SRP and hit rates with intervals, per domain, layer and expert, beside their controls."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from profiler.headline.subject import SEED, Rows, Subject, as_text, lengths_that_fit, part_of, with_controls
from profiler.metrics import local_consistency

MAX_SIZES = 256
"""Points of a hit-rate curve that are stored; longer curves are thinned evenly, the ends kept."""

NUM_RESAMPLES = 1000

Curve = NDArray[np.float64]


def segment_rows(subject: Subject) -> Rows:
    """SRP: the model with intervals and controls, every domain, every layer, every expert."""
    trace, rows = subject.trace, []
    if not subject.has_trace:
        return []
    for control, selections in with_controls(trace, subject.num_experts):
        rows += _srp_model(trace, selections, subject.num_experts, control)
    for domain in subject.run.domains:
        part = part_of(trace, np.flatnonzero(np.array(trace.domains) == domain))
        rows += _srp_model(part, part.ids, subject.num_experts, "observed", domain)
    return rows + _srp_parts(trace, subject.num_experts)


def hit_rate_rows(subject: Subject) -> Rows:
    """SCH, LRU, LFU and Belady at all cache sizes: one cache per layer and one for all; SCH and LRU beside controls."""
    if not subject.has_trace:
        return []
    trace = subject.replayed
    lengths = lengths_that_fit(trace) or [1]
    policies: list[tuple[str, int | None]] = [("sch", length) for length in lengths]
    policies += [("lru", None), ("lfu", None), ("belady", None)]
    controlled = [("sch", lengths[min(1, len(lengths) - 1)]), ("lru", None)]
    rows: Rows = []
    for control, selections in with_controls(trace, subject.num_experts):
        for policy, length in policies if control == "observed" else controlled:
            parameters: dict[str, Any] = {} if length is None else {"segment_length": length}
            replay = {"selections": selections, "num_experts": subject.num_experts, "policy": policy, **parameters}
            place: dict[str, Any] = {"metric": f"hit_rate_{policy}", "control": control}
            place |= {"tokens": trace.num_tokens, "sequences": len(trace.sequences)}
            rows += _own_caches(subject, replay, {**place, "parameters": as_text(parameters)})
            rows += _shared_cache(replay, {**place, "parameters": as_text({**parameters, "shared": True})})
    return rows


def _srp_model(
    trace: store.Trace, selections: NDArray[np.int16], num_experts: int, control: str, domain: str | None = None
) -> Rows:
    """SRP of the whole model at every segment length that fits."""
    lengths, rows = lengths_that_fit(trace), []
    if not lengths:
        return []
    table = local_consistency.srp_bootstrap_table(
        selections=selections,
        num_experts=num_experts,
        segment_lengths=lengths,
        scopes=["model"],
        num_resamples=NUM_RESAMPLES,
        seed=SEED,
    )
    for (length, _), found in table.items():
        used = trace.lengths >= length
        place = {"control": control, "domain": domain, "at": float(length)}
        place |= {"tokens": int(trace.lengths[used].sum()), "sequences": int(used.sum())}
        estimate = found.estimate
        ends = {"low": float(found.lower), "high": float(found.upper)}
        size_ends = {"low": float(found.router_size_lower), "high": float(found.router_size_upper)}
        rows.append({**place, "metric": "srp", "value": float(estimate.value), **ends})
        rows.append({**place, "metric": "router_size", "value": float(estimate.router_size), **size_ends})
        if control == "observed":
            rows.append({**place, "metric": "srp", "value": float(estimate.lower_bound), "control": "lower_bound"})
    return rows


def _srp_parts(trace: store.Trace, num_experts: int) -> Rows:
    """SRP of every layer and of every expert."""
    lengths, rows = lengths_that_fit(trace), []
    if not lengths:
        return []
    table = local_consistency.srp_table(
        selections=trace.ids, num_experts=num_experts, segment_lengths=lengths, scopes=["layer", "expert"]
    )
    for (length, scope), found in table.items():
        for axis, (layer, step) in enumerate(trace.layers):
            place = {"layer": layer, "step": step, "at": float(length)}
            if scope == "layer":
                rows.append({**place, "metric": "srp", "value": float(found.value[axis])})
                rows.append({**place, "metric": "router_size", "value": float(found.router_size[axis])})
            else:
                values = enumerate(found.value[axis].tolist())
                rows += [{**place, "metric": "srp", "expert": expert, "value": value} for expert, value in values]
    return rows


def _own_caches(subject: Subject, replay: dict[str, Any], place: dict[str, Any]) -> Rows:
    """Hit rates of one cache per layer: their mean over layers and, for the observed trace, each layer's."""
    layers = local_consistency.hit_rate_curve(**replay)
    rows = _curve(np.nanmean(layers, axis=0), place)
    if place["control"] == "observed":
        for axis, curve in enumerate(layers):
            layer, step = subject.trace.layers[axis]
            rows += _curve(curve, {**place, "layer": layer, "step": step})
    return rows


def _shared_cache(replay: dict[str, Any], place: dict[str, Any]) -> Rows:
    """Hit rates of one cache for all layers; with intervals for the observed trace."""
    if place["control"] != "observed":
        return _curve(local_consistency.hit_rate_curve(**replay, shared=True), place)
    found = local_consistency.hit_rate_bootstrap(**replay, shared=True, num_resamples=NUM_RESAMPLES, seed=SEED)
    return _curve(found.estimate, place, found.lower, found.upper)


def _curve(values: Curve, place: dict[str, Any], low: Curve | None = None, high: Curve | None = None) -> Rows:
    """Rows of a hit-rate curve; entry c - 1 belongs to c slots."""
    sizes = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_SIZES)).round().astype(int))
    rows = []
    for size in sizes:
        row = {**place, "at": float(size + 1), "value": float(values[size])}
        if low is not None and high is not None:
            row |= {"low": float(low[size]), "high": float(high[size])}
        rows.append(row)
    return rows
