"""Load of every MoE layer, with intervals over sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.layerwise import LayerPart, joined
from profiler.headline.subject import SEED, Rows, Subject
from profiler.metrics import load
from profiler.metrics._intervals import Resamples, interval

BALANCE_FIELDS = {
    "load_entropy": "entropy",
    "normalised_load_entropy": "normalised_entropy",
    "effective_experts": "effective_experts",
    "gini": "gini",
    "cv": "cv",
    "max_violation": "max_violation",
}
"""Metrics of load by their name in the registry, and the field of ``load.Balance`` that holds them."""

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95

Counts = NDArray[np.int64]
Values = dict[str, NDArray[np.float64]]


def load_layer(subject: Subject, axis: int) -> Rows:
    """Balance of one MoE layer, over all text and per domain; with intervals where there is a trace of all of it."""
    layer = subject.run.layers[axis]
    part = subject.once(_loads).filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
    drawn = subject.once(_Drawn) if subject.has_whole_trace else None
    resampled = drawn.counts(axis) if drawn is not None else {}
    rows: Rows = []
    for domain in [None, *subject.run.domains]:
        counts = layer_counts(part if domain is None else part.filter(pl.col("domain") == domain), layer)[None]
        if not counts.sum():
            continue
        tokens = subject.tokens_of(domain)
        place = {"domain": domain, "layer": layer.layer, "step": layer.step, "tokens": tokens}
        estimate = _measures(counts, layer, float(tokens))
        if domain not in resampled:
            rows += [{"metric": name, "value": float(value[0]), **place} for name, value in estimate.items()]
            continue
        each = resampled[domain]
        ends = _ends(estimate, _measures(each, layer, tokens * each.sum(1) / counts.sum()), layer.num_experts)
        place["sequences"] = drawn.sequences(domain) if drawn is not None else None
        rows += [
            {"metric": name, "value": float(value[0]), "low": ends[name][0], "high": ends[name][1], **place}
            for name, value in estimate.items()
        ]
    return rows


LOAD = LayerPart("load", load_layer, joined, needs_trace=False)
"""Load, layer by layer."""


def _loads(subject: Subject) -> pl.DataFrame:
    return subject.run.table("expert_load").filter(pl.col("kind") == "routed")


@dataclass
class _Drawn:
    """Resampled texts of a run: pooled, and each domain by itself."""

    subject: Subject
    _domain: NDArray[np.str_] = field(init=False)
    _resamples: dict[str | None, Resamples] = field(init=False)

    def __post_init__(self) -> None:
        self._domain = np.concatenate([block.domains for block in self.subject.blocks])
        several = {name: int((self._domain == name).sum()) for name in self.subject.run.domains}
        wanted: dict[str | None, int] = {None: len(self._domain)}
        wanted.update(several)
        self._resamples = {
            name: Resamples.of(count, num_resamples=NUM_RESAMPLES, seed=SEED)
            for name, count in wanted.items()
            if count > 1
        }

    def sequences(self, domain: str | None) -> int:
        """Sequences of one domain, or of all text."""
        return len(self._resamples[domain].group)

    def counts(self, axis: int) -> dict[str | None, NDArray[np.float64]]:
        """Selections of the experts of one layer in every resample, (resamples, experts), by domain; None = all."""
        from profiler.metrics._counts import counts_of, summed_by

        layer = self.subject.run.layers[axis]
        sums: dict[str | None, Counts] = {
            name: np.zeros((one.groups, layer.num_experts), np.int64) for name, one in self._resamples.items()
        }
        seen: dict[str | None, int] = dict.fromkeys(self._resamples, 0)
        for block in self.subject.blocks:
            counts = counts_of(self.subject.ids(axis, block), block.offsets, layer.num_experts)
            for name, one in self._resamples.items():
                here = counts if name is None else counts[block.domains == name]
                group = one.group[seen[name] : seen[name] + len(here)]
                sums[name] += summed_by(here, group, one.groups)
                seen[name] += len(here)
        return {name: one.sums(sums[name]) for name, one in self._resamples.items()}


def _measures(counts: NDArray[Any], layer: store.LayerInfo, tokens: float | NDArray[np.float64]) -> Values:
    """Every measure of evenness, and how many experts are (nearly) dead, for counts (texts, experts)."""
    evenness = load.balance(load=counts)
    dead = load.dead_experts(counts=counts, top_k=layer.top_k, tokens=tokens)
    values = {metric: getattr(evenness, field) for metric, field in BALANCE_FIELDS.items()}
    return values | {"dead_experts": dead.dead.sum(1), "nearly_dead_experts": dead.nearly_dead.sum(1)}


def _ends(estimate: Values, resampled: Values, num_experts: int) -> dict[str, tuple[float, float]]:
    """Interval ends of every measure by the "basic" rule, kept inside the measure's range."""
    limits = {"load_entropy": np.log(num_experts), "normalised_load_entropy": 1.0}
    limits |= dict.fromkeys(("effective_experts", "dead_experts", "nearly_dead_experts"), num_experts)
    ends = {}
    for name, value in estimate.items():
        low, high = interval(estimate=value[0], resampled=resampled[name], confidence=CONFIDENCE, rule="basic")
        most = limits.get(name, np.inf)
        ends[name] = (float(np.clip(low, 0.0, most)), float(np.clip(high, 0.0, most)))
    return ends


def layer_counts(frame: pl.DataFrame, layer: store.LayerInfo) -> Counts:
    """(experts,) selections of each expert of one layer, from its rows of ``expert_load``."""
    counts = np.zeros(layer.num_experts, np.int64)
    summed = frame.group_by("expert").agg(pl.col("tokens").sum())
    counts[summed["expert"].to_numpy()] = summed["tokens"].to_numpy()
    return counts
