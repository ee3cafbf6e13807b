"""What a second layer back says about a layer's first choice, and how often chained steps repeat their experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiler.headline.flow import CONFIDENCE, MOST_EXPERTS, PARTS, parts_of
from profiler.headline.subject import SEED, Rows, Sample, Subject
from profiler.metrics import chained_steps, layer_memory, transitions
from profiler.metrics._intervals import jackknife
from store import LayerInfo

SAMPLE_TOKENS = 100_000
"""Tokens of whole sequences, drawn at random, on which both rest."""


def layer_memory_rows(subject: Subject) -> Rows:
    """Memory of two layers, of every MoE layer from the third on, beside choices exchanged among equal tokens."""
    rows: Rows = []
    if not subject.has_trace or len(subject.run.layers) < 3 or not len(subject.lengths):
        return rows
    sample = subject.sample(SAMPLE_TOKENS)
    part = np.repeat(_part(subject, sample), sample.block.lengths)
    size = {"tokens": sample.block.tokens, "sequences": len(sample.block.lengths)}
    two_back, one_back = (_first_choices(sample, axis) for axis in (0, 1))
    for axis, layer in enumerate(subject.run.layers[2:], 2):
        chosen = _first_choices(sample, axis)
        dealt = layer_memory.exchanged(two_back=two_back, one_back=one_back, seed=SEED)
        for control, earlier in (("observed", two_back), ("exchanged", dealt)):
            value, without = layer_memory.memory_information(
                two_back=earlier, one_back=one_back, chosen=chosen, part=part, num_parts=PARTS
            )
            if np.isnan(value):
                continue
            ends = _ends(value, without[np.unique(part)]) if control == "observed" else {}
            place = {"metric": "layer_memory", "layer": layer.layer, "step": layer.step, "control": control}
            rows.append({**place, "value": value, **ends, **size})
        two_back, one_back = one_back, chosen
    return rows


def step_repeat_rows(subject: Subject) -> Rows:
    """How often a step runs the experts of the step before again, for layers with several calls."""
    rows: Rows = []
    pairs = list(successive_steps(subject.run.layers))
    if not subject.has_trace or not pairs or not len(subject.lengths):
        return rows
    sample = subject.sample(SAMPLE_TOKENS)
    part = _part(subject, sample)
    size = {"tokens": sample.block.tokens, "sequences": len(sample.block.lengths)}
    for earlier, later in pairs:
        layer = subject.run.layers[later]
        counts = transitions.transition_counts(
            first=sample.ids(earlier), second=sample.ids(later), offsets=sample.block.offsets,
            num_experts=[layer.num_experts] * 2, part=part, num_parts=PARTS,
        )  # fmt: skip
        loads = [_loads(sample.ids(axis), part, sample.block.lengths, layer.num_experts) for axis in (earlier, later)]
        total = [counts.sum(axis=0), *(load.sum(axis=0) for load in loads)]
        value = float(chained_steps.step_repeat(counts=total[0], later=total[2]))
        if np.isnan(value):
            continue
        present = np.unique(part)
        left = chained_steps.step_repeat(counts=total[0] - counts[present], later=total[2] - loads[1][present])
        chance = chained_steps.repeat_by_popularity(earlier=total[1], later=total[2], tokens=sample.block.tokens)
        place: dict[str, Any] = {"metric": "step_repeat", "layer": layer.layer, "step": layer.step, **size}
        rows.append({**place, "value": value, **_ends(value, left)})
        rows.append({**place, "control": "popularity", "value": float(chance)})
    return rows


def successive_steps(layers: list[LayerInfo]) -> Iterator[tuple[int, int]]:
    """Places of each step of a layer and of the last step before it that called the same experts."""
    for later, layer in enumerate(layers):
        before = [
            place
            for place, one in enumerate(layers[:later])
            if (one.layer, one.module, one.num_experts) == (layer.layer, layer.module, layer.num_experts)
        ]
        if before and layer.num_experts <= MOST_EXPERTS:
            yield before[-1], later


def _first_choices(sample: Sample, axis: int) -> NDArray[np.int64]:
    return sample.ids(axis)[:, 0].astype(np.int64)


def _part(subject: Subject, sample: Sample) -> NDArray[np.int64]:
    """(sequences,) part of each sequence of the sample."""
    return parts_of(subject.groups)[sample.group]


def _loads(
    ids: NDArray[np.int16], part: NDArray[np.int64], lengths: NDArray[np.int64], experts: int
) -> NDArray[np.int64]:
    """(parts, experts) choices."""
    place = np.repeat(part, lengths)[:, None] * experts + ids
    return np.bincount(place[ids >= 0], minlength=PARTS * experts).reshape(PARTS, experts).astype(np.int64)


def _ends(value: float, without: NDArray[np.float64]) -> dict[str, float]:
    low, high = jackknife(estimate=np.array(value), without=without, confidence=CONFIDENCE)
    return {"low": max(float(low), 0.0), "high": float(high)} if np.isfinite(low) else {}
