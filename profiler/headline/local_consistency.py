"""SRP with intervals, per domain, layer and expert, beside its controls; read layer by layer and block by block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import store
from profiler.headline.layerwise import LayerPart
from profiler.headline.subject import CONTROLS, SEED, Block, Rows, Subject, lengths_that_fit
from profiler.metrics._segment_bootstrap import Bootstrap, group_interval
from profiler.metrics._segments import SegmentSums, best_threshold, segment_sums
from profiler.metrics._trace import in_order

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
BOOTSTRAP = Bootstrap(NUM_RESAMPLES, CONFIDENCE, "basic", SEED)

CONTROL_TOKENS = 150_000
"""Tokens of whole sequences, drawn at random, on which controls rest; more narrow little."""

Curve = NDArray[np.float64]


Windows = dict[str, dict[int, NDArray[np.int64]]]
"""By control and segment length, windows by group of sequences: (groups, m + 1)."""


def segment_layer(subject: Subject, axis: int) -> tuple[Rows, Windows]:
    """SRP of one layer with intervals, of its experts, and its windows beside those of its controls."""
    rows: Rows = []
    windows: Windows = {}
    for control in CONTROLS:
        sums = _layer_sums(subject, axis, control)
        windows[control] = {length: one.groups for length, one in sums.items()}
        if control == "observed":
            rows = [row for one in sums.values() for row in _layer_rows(one, subject.run.layers[axis])]
    return rows, windows


def segment_rows(subject: Subject, found: Iterable[tuple[Rows, Windows]]) -> Rows:
    """SRP: the model with intervals and controls, every domain, every layer with intervals, every expert."""
    rows: Rows = []
    model: Windows = {}
    for layer_rows, windows in found:
        rows += layer_rows
        for control, lengths in windows.items():
            total = model.setdefault(control, {})
            for length, groups in lengths.items():
                total[length] = total[length] + groups if length in total else groups
    if not rows:
        return []
    everything = _Texts(subject.lengths, subject.groups.group, subject.groups.domain)
    controls = subject.sample(CONTROL_TOKENS)
    drawn = _Texts(controls.block.lengths, controls.group, subject.groups.domain)
    for control, lengths in model.items():
        texts = everything if control == "observed" else drawn
        rows += [row for one in lengths.items() for row in _model_rows(texts, *one, control)]
    for domain in subject.run.domains:
        rows += [row for one in model["observed"].items() for row in _model_rows(everything, *one, "observed", domain)]
    return rows


SEGMENTS = LayerPart("segment", segment_layer, segment_rows)
"""SRP, layer by layer."""


@dataclass(frozen=True)
class _Texts:
    """The sequences that windows were counted in: their lengths and groups, and the domain of each group."""

    lengths: NDArray[np.int64]
    group: NDArray[np.int64]
    domain: NDArray[np.str_]


def _layer_sums(subject: Subject, axis: int, control: str) -> dict[int, SegmentSums]:
    """Windows of one layer by segment length: over all sequences, or, of a control, over a sample."""
    totals: dict[int, SegmentSums] = {}
    text = subject.everything if control == "observed" else subject.sample(CONTROL_TOKENS)
    lengths = lengths_that_fit(subject.lengths)
    for mine, block, ids in text.pieces(axis, control):

        def one(
            length: int, ids: NDArray[np.int16] = ids, block: Block = block, group: NDArray[np.int64] = text.group[mine]
        ) -> SegmentSums:
            return segment_sums(
                ids=ids, offsets=block.offsets, num_experts=subject.run.layers[axis].num_experts,
                segment_length=length, group=group, num_groups=subject.groups.count,
            )  # fmt: skip

        for sums in in_order(one, lengths):
            length = sums.segment_length
            totals[length] = totals[length] + sums if length in totals else sums
    return totals


def _model_rows(texts: _Texts, length: int, groups: NDArray[np.int64], control: str, domain: str | None = None) -> Rows:
    """SRP and router size of the whole model at one segment length, over all text or one domain."""
    long_enough = texts.lengths >= length
    if domain is not None:
        mine = texts.domain == domain
        groups = groups[mine]
        long_enough &= mine[texts.group]
    if int(long_enough.sum()) < 2:
        return []
    estimate, lower, upper = group_interval(histogram=groups, segment_length=length, settings=BOOTSTRAP)
    place = {"control": control, "domain": domain, "at": float(length)}
    place |= {"tokens": int(texts.lengths[long_enough].sum()), "sequences": int(long_enough.sum())}
    rows = _with_ends(place, estimate, lower, upper)
    if control == "observed":
        pooled = groups.sum(axis=0)
        share = float(pooled @ np.arange(length + 1) / max(length * pooled.sum(), 1))
        rows.append({**place, "metric": "srp", "value": 2.0 * share / (1.0 + share), "control": "lower_bound"})
    return rows


def _layer_rows(sums: SegmentSums, layer: store.LayerInfo) -> Rows:
    """SRP of one layer, with intervals, and of each of its experts."""
    place = {"layer": layer.layer, "step": layer.step, "at": float(sums.segment_length)}
    ends = group_interval(histogram=sums.groups, segment_length=sums.segment_length, settings=BOOTSTRAP)
    experts, _, _ = best_threshold(sums.experts, sums.segment_length)
    rows = _with_ends(place, *ends)
    return rows + [
        {**place, "metric": "srp", "expert": expert, "value": value} for expert, value in enumerate(experts.tolist())
    ]


def _with_ends(place: dict[str, Any], estimate: Curve, lower: Curve, upper: Curve) -> Rows:
    """Rows of SRP and router size with their intervals."""
    ends = zip(("srp", "router_size"), estimate.tolist(), lower.tolist(), upper.tolist(), strict=True)
    return [{**place, "metric": name, "value": value, "low": low, "high": high} for name, value, low, high in ends]
