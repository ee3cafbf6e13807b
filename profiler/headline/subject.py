"""A finished run with the parts that several metrics need, and the rows that results become."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.metrics import controls

SEGMENT_LENGTHS = (4, 16, 64, 256)
"""Segment lengths of the paper that introduced SRP and SCH, so that its published values stand beside a run's."""

REPLAY_COST = 5e9
"""Bound on tokens x requests per token x objects of one cache replay: about two seconds a policy on two cores."""

SEED = 0

Rows = list[dict[str, Any]]
"""Rows of table ``metric_value``; what a row leaves out takes its default there."""


@dataclass
class Subject:
    """A finished run with the parts that several metrics need."""

    run: store.Run

    @cached_property
    def trace(self) -> store.Trace:
        """The whole trace."""
        return self.run.selections()

    @property
    def has_trace(self) -> bool:
        """Whether the run holds selections; imported counts do not."""
        return self.trace.ids.size > 0

    @cached_property
    def num_experts(self) -> int:
        """The largest number of routed experts of any layer."""
        return max(layer.num_experts for layer in self.run.layers)

    @cached_property
    def replayed(self) -> store.Trace:
        """The trace, or as many of its sequences, drawn at random, as a cache replay can take in good time."""
        layers, _, _, width = self.trace.ids.shape
        affordable = REPLAY_COST / (layers * width * layers * self.num_experts)
        sequences = len(self.trace.sequences)
        count = max(2, int(sequences * min(1.0, affordable / max(self.trace.num_tokens, 1))))
        # At random, not every n-th: domains often alternate, and a stride could pick a single one.
        drawn = np.random.default_rng(SEED).permutation(sequences)[:count]
        return part_of(self.trace, np.sort(drawn))

    def tokens_of(self, domain: str | None) -> int:
        """Real tokens of one domain, or of all text."""
        frame = self.run.table("sequence")
        return int((frame if domain is None else frame.filter(pl.col("domain") == domain))["tokens"].sum())


def lengths_that_fit(trace: store.Trace) -> list[int]:
    """Segment lengths that at least two sequences reach: with fewer there is no interval."""
    return [length for length in SEGMENT_LENGTHS if int((trace.lengths >= length).sum()) >= 2]


def with_controls(trace: store.Trace, num_experts: int) -> Iterator[tuple[str, NDArray[np.int16]]]:
    """The trace, and the three traces that say what popularity alone, and chance alone, would give."""
    common: dict[str, Any] = {"selections": trace.ids, "num_experts": num_experts, "seed": SEED}
    yield "observed", trace.ids
    yield "shuffled_in_sequence", controls.shuffle_within_sequences(**common)
    yield "shuffled", controls.shuffle_across_sequences(**common)
    yield "uniform", controls.uniform_experts(**common)


def part_of(trace: store.Trace, index: NDArray[np.int64]) -> store.Trace:
    """Some of a trace's sequences."""
    return store.Trace(
        ids=trace.ids[:, index],
        weights=trace.weights[:, index],
        layers=trace.layers,
        sequences=trace.sequences[index],
        lengths=trace.lengths[index],
        domains=[trace.domains[place] for place in index],
    )


def as_text(parameters: dict[str, Any]) -> str:
    """Parameters as the text that identifies them."""
    return json.dumps(parameters, sort_keys=True)
