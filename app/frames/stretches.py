"""The trace of some layers, stretch by stretch: what frames count in when a page asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import store
from app.frames.axes import parse_layer
from app.frames.expert_trace import MAX_STRETCHES, STRETCH_TOKENS
from profiler.metrics._trace import sequence_runs


@dataclass(frozen=True)
class Stretch:
    """Successive whole sequences of a run.

    layers: ids (tokens, k) of each layer asked for, -1 = none. sequences (sequences,) their numbers; offsets
    (sequences + 1,) their first tokens; mine (sequences,) 1 where they are of the domain, else 0.
    """

    layers: list[NDArray[np.int16]]
    sequences: NDArray[np.int64]
    offsets: NDArray[np.int64]
    mine: NDArray[np.int64]


def stretches(
    run: store.Run, labels: Sequence[str], *, domain: str | None = None, most: int | None = None
) -> Iterator[Stretch]:
    """The selections of some layers in stretches of whole sequences; of a long trace, 16 or ``most`` of them, evenly
    apart.

    Stretches without a sequence of the domain are left out.
    """
    most = most or MAX_STRETCHES
    frame = run.traced_sequences
    numbers = frame["sequence"].to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(frame["tokens"].to_numpy().astype(np.int64))])
    mine = np.ones(len(frame), np.int64) if domain is None else (frame["domain"] == domain).to_numpy().astype(np.int64)
    bounds = [(low, high) for low, high in sequence_runs(offsets, STRETCH_TOKENS) if mine[low:high].any()]
    if len(bounds) > most:
        bounds = [bounds[at] for at in np.linspace(0, len(bounds) - 1, most).round().astype(int)]
    for low, high in bounds:
        reads = [
            run.layer_selections(layer=layer, step=step, first=int(numbers[low]), last=int(numbers[high - 1]))
            for layer, step in map(parse_layer, labels)
        ]
        yield Stretch([read.ids for read in reads], reads[0].sequences, reads[0].offsets, mine[low:high])
