"""Axes of a run, position and what its sequences were labelled with, and how much routing depends on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.headline.flow import CONFIDENCE, PARTS, parts_of
from profiler.headline.subject import SEED, Rows, Sample, Subject, as_text
from profiler.metrics import axis_distance
from profiler.metrics._intervals import jackknife

POSITION = "position"
"""The axis that every run with a trace has: for images cut into patches, the patch."""

MOST_VALUES = 24
"""Values of an axis that are told apart; numbers beyond are put into ranges, words beyond are left out."""

SAMPLE_TOKENS = 200_000
"""Tokens of whole sequences, drawn at random, on which distances rest."""

EXCHANGES = 9
"""Times that labels are given to other sequences for the control."""


@dataclass(frozen=True)
class Axis:
    """One axis: its values in order, and which of them each sequence has.

    names (values,); place: by sequence number, index of its value; a sequence without one is left out. Of position,
    ``place`` is empty and ``edges`` (values,) are the first positions of the ranges.
    """

    name: str
    names: tuple[str, ...]
    place: dict[int, int]
    edges: NDArray[np.int64] | None = None

    def of_tokens(self, sequences: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(tokens,) index of each token's value, sequence after sequence; -1 = none."""
        if self.edges is not None:
            first = np.repeat(np.cumsum(lengths) - lengths, lengths)
            position = np.arange(int(lengths.sum())) - first
            return np.searchsorted(self.edges, position, side="right").astype(np.int64) - 1
        return np.repeat(self.of_sequences(sequences), lengths)

    def of_sequences(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """(sequences,) index of each one's value; -1 = none. Not of position."""
        return np.array([self.place.get(int(number), -1) for number in sequences], dtype=np.int64)


def axis_names(run: store.Run) -> list[str]:
    """The axes of a run: its labels by name, then position; none without a trace."""
    if not run.has_trace:
        return []
    return [*run.table("sequence_label")["axis"].unique().sort().to_list(), POSITION]


def axis_of(run: store.Run, name: str) -> Axis:
    """One axis of a run; one that it does not have has no values."""
    if name == POSITION:
        longest = max(run.traced_sequences["tokens"].to_list(), default=0)
        edges = _position_edges(longest)
        ends = [*(int(edge) - 1 for edge in edges[1:]), longest - 1]
        return Axis(name, tuple(_range(int(low), high) for low, high in zip(edges, ends, strict=True)), {}, edges)
    labels = run.table("sequence_label").filter(pl.col("axis") == name)
    values, sequences = labels["value"], labels["sequence"].to_list()
    numbers = values.cast(pl.Float64, strict=False)
    if len(values) and not numbers.null_count():
        names, place = _numbers(numbers.to_numpy())
    else:
        names, place = _words(values)
    return Axis(name, names, {number: at for number, at in zip(sequences, place, strict=True) if at >= 0})


def axis_distance_rows(subject: Subject) -> Rows:
    """Distance of every value of every axis from the average, by layer, and of the axis as a whole; with controls."""
    rows: Rows = []
    if not subject.has_trace or not len(subject.lengths):
        return rows
    sample = subject.sample(SAMPLE_TOKENS)
    part = parts_of(subject.groups)[sample.group]
    for axis in (axis_of(subject.run, name) for name in axis_names(subject.run)):
        if len(axis.names) > 1:
            rows += _axis_rows(subject, sample, part, axis)
    return rows


def _axis_rows(subject: Subject, sample: Sample, part: NDArray[np.int64], axis: Axis) -> Rows:
    block = sample.block
    observed = axis.of_tokens(block.sequences, block.lengths)
    others = _exchanged(axis, sample, observed)
    tokens = np.bincount(observed[observed >= 0], minlength=len(axis.names))
    token_part = np.repeat(part, block.lengths)
    rows: Rows = []
    for number, layer in enumerate(subject.run.layers):
        ids = sample.ids(number)
        size = {"num_values": len(axis.names), "num_experts": layer.num_experts}
        split = axis_distance.axis_counts(
            ids=ids, place=np.where(observed >= 0, token_part * len(axis.names) + observed, -1),
            num_values=PARTS * len(axis.names), num_experts=layer.num_experts,
        ).reshape(PARTS, len(axis.names), -1)  # fmt: skip
        counts = split.sum(axis=0)
        left = counts - split[np.unique(part)]
        chance = np.stack([axis_distance.axis_counts(ids=ids, place=place, **size) for place in others])
        place = {"metric": "axis_distance", "layer": layer.layer, "step": layer.step, "sequences": len(block.lengths)}
        rows += _rows(axis, counts, left, chance, tokens, place)
    return rows


def _rows(
    axis: Axis,
    counts: NDArray[np.int64],
    left: NDArray[np.int64],
    chance: NDArray[np.int64],
    tokens: NDArray[np.int64],
    place: dict[str, Any],
) -> Rows:
    """Rows of one axis and layer: of every value, and of all together, observed and exchanged."""
    each, without, by_chance = (axis_distance.axis_distance(counts=one) for one in (counts, left, chance))
    whole = _weighted(each, counts)
    found = [("", whole, _weighted(without, left), _weighted(by_chance, chance), int(tokens.sum()))]
    found += [(name, each[at], without[:, at], by_chance[:, at], int(tokens[at])) for at, name in enumerate(axis.names)]
    rows: Rows = []
    for at, (name, value, less, other, number) in enumerate(found):
        if not np.isfinite(value):
            continue
        named = {"axis": axis.name, "value": name, "place": at - 1} if name else {"axis": axis.name}
        here = {**place, "parameters": as_text(named), "tokens": number}
        low, high = jackknife(estimate=np.asarray(value), without=less[np.isfinite(less)], confidence=CONFIDENCE)
        ends = {"low": max(float(low), 0.0), "high": min(float(high), 1.0)} if np.isfinite(low) else {}
        rows.append({**here, "value": float(value), **ends})
        other = other[np.isfinite(other)]
        if len(other):
            ends = {"low": float(other.min()), "high": float(other.max())} if len(other) > 1 else {}
            rows.append({**here, "control": "exchanged", "value": float(other.mean()), **ends})
    return rows


def _weighted(distances: NDArray[np.float64], counts: NDArray[np.int64]) -> Any:
    """Mean over the values (last axis), weighted by their selections."""
    weights = counts.sum(axis=-1)
    return (np.nan_to_num(distances) * weights).sum(axis=-1) / np.maximum(weights.sum(axis=-1), 1)


def _exchanged(axis: Axis, sample: Sample, observed: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The values of the tokens when they say nothing: those of other sequences, or of other tokens of the same text."""
    block = sample.block
    if axis.edges is not None:
        return [observed[sample.order("shuffled_in_sequence")]]
    labels = axis.of_sequences(block.sequences)
    generator = np.random.default_rng(SEED)
    return [np.repeat(generator.permutation(labels), block.lengths) for _ in range(EXCHANGES)]


def _position_edges(longest: int) -> NDArray[np.int64]:
    """First positions of the ranges: every position where they are few, else the first alone and equal ranges."""
    if longest <= MOST_VALUES:
        return np.arange(max(longest, 1), dtype=np.int64)
    rest = np.linspace(1, longest, 16)[:-1].round().astype(np.int64)
    return np.concatenate([[0], rest])


def _numbers(numbers: NDArray[np.float64]) -> tuple[tuple[str, ...], list[int]]:
    """Numbers in their order, in ranges of about equally many sequences where they are many."""
    known, place = np.unique(numbers, return_inverse=True)
    if len(known) <= MOST_VALUES:
        return tuple(f"{value:.15g}" for value in known), place.tolist()
    wanted = np.linspace(0, len(numbers), 17)[1:-1]
    edges = np.unique(np.sort(numbers)[wanted.astype(np.int64)])
    bins = np.searchsorted(edges, numbers, side="right")
    used, place = np.unique(bins, return_inverse=True)
    return tuple(_between(numbers[bins == one]) for one in used), place.tolist()


def _words(values: pl.Series) -> tuple[tuple[str, ...], list[int]]:
    """Words in alphabetical order; of many, the most frequent ones, the others left out."""
    counted = values.value_counts().sort(["count", values.name], descending=[True, False]).head(MOST_VALUES)
    names = sorted(counted[values.name].to_list())
    order = {name: at for at, name in enumerate(names)}
    return tuple(names), [order.get(value, -1) for value in values.to_list()]


def _between(numbers: NDArray[np.float64]) -> str:
    low, high = f"{numbers.min():.6g}", f"{numbers.max():.6g}"
    return low if low == high else f"{low} to {high}"


def _range(low: int, high: int) -> str:
    return str(low) if high <= low else f"{low} to {high}"
