"""What one expert of one layer did, read from the trace stretch by stretch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import store
from app.frames.axes import layer_label, layer_labels
from moescope.errors import InputError
from profiler.metrics._trace import sequence_runs

STRETCH_TOKENS = 65_536
"""Tokens that are in memory at once."""

MAX_STRETCHES = 16
"""Of a longer trace, so many stretches are read, evenly apart: a million tokens say what one expert is for."""


@dataclass(frozen=True)
class ExpertBlock:
    """Successive sequences of a run and what one expert of a layer did there.

    sequences (sequences,); offsets (sequences + 1,) their first tokens; ids (tokens, k) selections, -1 = none; hit
    (tokens,) whether the expert is among them; weights (tokens,) its gate weight, 0 elsewhere.
    """

    sequences: NDArray[np.int64]
    offsets: NDArray[np.int64]
    ids: NDArray[np.int16]
    hit: NDArray[np.bool_]
    weights: NDArray[np.float32]


def layer_info(run: store.Run, label: str, expert: int = 0) -> store.LayerInfo:
    """The MoE layer of that name, which has that expert.

    Raises:
        InputError: there is no such layer, or it has no such expert.
    """
    known = {layer_label(layer.layer, layer.step): layer for layer in run.layers}
    if label not in known:
        raise InputError(f"layer {label} is no MoE layer of run {run.name!r}: it has {_ranges(layer_labels(run))}")
    if not 0 <= expert < known[label].num_experts:
        last = known[label].num_experts - 1
        raise InputError(f"layer {label} of run {run.name!r} has no expert {expert}: its experts are 0 to {last}")
    return known[label]


def expert_blocks(run: store.Run, *, label: str, expert: int) -> Iterator[ExpertBlock]:
    """The trace of one expert in stretches of whole sequences; of a long trace, some of them."""
    layer = layer_info(run, label, expert)
    frame = run.traced_sequences
    numbers = frame["sequence"].to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(frame["tokens"].to_numpy().astype(np.int64))])
    stretches = list(sequence_runs(offsets, STRETCH_TOKENS))
    if len(stretches) > MAX_STRETCHES:
        stretches = [stretches[at] for at in np.linspace(0, len(stretches) - 1, MAX_STRETCHES).round().astype(int)]
    for low, high in stretches:
        read = run.layer_selections(
            layer=layer.layer, step=layer.step, first=int(numbers[low]), last=int(numbers[high - 1]), weights=True
        )
        mine = read.ids == expert
        weights = np.zeros(len(mine), np.float32) if read.weights is None else (read.weights * mine).sum(axis=1)
        yield ExpertBlock(read.sequences, read.offsets, read.ids, mine.any(axis=1), weights)


def _ranges(labels: list[str]) -> str:
    """Names of layers, runs of numbers written as ranges."""
    parts: list[list[str]] = []
    for label in labels:
        if parts and label.isdigit() and parts[-1][-1].isdigit() and int(label) == int(parts[-1][-1]) + 1:
            parts[-1].append(label)
        else:
            parts.append([label])
    return ", ".join(part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
