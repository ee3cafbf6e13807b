"""Load of every MoE layer, and how often neighbouring tokens share experts."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.subject import Rows, Subject, with_controls
from profiler.metrics import load, temporal

BALANCE_FIELDS = {
    "load_entropy": "entropy",
    "normalised_load_entropy": "normalised_entropy",
    "effective_experts": "effective_experts",
    "gini": "gini",
    "cv": "cv",
    "max_violation": "max_violation",
}
"""Metrics of load by their name in the registry, and the field of ``load.Balance`` that holds them."""


def load_rows(subject: Subject) -> Rows:
    """Balance of every MoE layer, over all text and per domain."""
    frame = subject.run.table("expert_load").filter(pl.col("kind") == "routed")
    rows: Rows = []
    for domain in [None, *subject.run.domains]:
        part = frame if domain is None else frame.filter(pl.col("domain") == domain)
        for layer in subject.run.layers:
            counts = _counts(part, layer)[None]
            if not counts.sum():
                continue
            tokens = subject.tokens_of(domain)
            evenness = load.balance(load=counts)
            dead = load.dead_experts(counts=counts, top_k=layer.top_k, tokens=tokens)
            values = {metric: getattr(evenness, field)[0] for metric, field in BALANCE_FIELDS.items()}
            values |= {"dead_experts": dead.dead.sum(), "nearly_dead_experts": dead.nearly_dead.sum()}
            place = {"domain": domain, "layer": layer.layer, "step": layer.step, "tokens": tokens}
            rows += [{"metric": name, "value": float(value), **place} for name, value in values.items()]
    return rows


def repetition_rows(subject: Subject) -> Rows:
    """How often neighbouring tokens share experts."""
    rows: Rows = []
    if not subject.has_trace or int(subject.trace.lengths.max(initial=0)) < 2:
        return rows
    for control, selections in with_controls(subject.trace, subject.num_experts):
        repeats = temporal.repeat_rates(selections=selections, num_experts=subject.num_experts, lag=1)
        for axis, (layer, step) in enumerate(subject.trace.layers):
            place = {"control": control, "layer": layer, "step": step, "at": 1.0}
            rows.append({"metric": "first_choice_repeat", "value": float(repeats.first_choice[axis]), **place})
            rows.append({"metric": "mean_overlap", "value": float(repeats.mean_overlap[axis]), **place})
    return rows


def _counts(frame: pl.DataFrame, layer: store.LayerInfo) -> NDArray[np.int64]:
    """(experts,) selections of each expert of one layer."""
    part = frame.filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
    counts = np.zeros(layer.num_experts, np.int64)
    summed = part.group_by("expert").agg(pl.col("tokens").sum())
    counts[summed["expert"].to_numpy()] = summed["tokens"].to_numpy()
    return counts
