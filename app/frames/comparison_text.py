"""One sequence in two runs, token by token: its text, the experts of each token, and where the two differ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames import comparison_made
from app.frames.axes import layer_label
from app.frames.token_routes import Routes
from app.frames.tokens import sequence_tokens
from profiler.expert_pairs import pair_layers, renamed
from profiler.metrics.comparison import token_agreement


@dataclass(frozen=True)
class Side:
    """One run's part: text, one row per token as ``app.frames.tokens.sequence_tokens``; routes, experts named as in the
    original where a plan has renumbered them."""

    text: pl.DataFrame
    routes: Routes


@dataclass(frozen=True)
class Both:
    """A sequence in both runs.

    Attributes:
        first: of the first run.
        second: of the second run, its layers named as in the first.
        flipped: (layers, tokens) whether the set of experts differs.
        overlap: (layers, tokens) experts in common over those of the larger set, 0..1.
    """

    first: Side
    second: Side
    flipped: NDArray[np.bool_]
    overlap: NDArray[np.float64]

    def marks(self, label: str | None) -> list[int]:
        """Positions of the tokens that flip in a layer, or in any."""
        rows = self.flipped if label is None else self.flipped[[self.first.routes.labels.index(label)]]
        return np.flatnonzero(rows.any(0)).tolist()

    def colours(self, label: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        """For each run one row per token: position, expert = first choice, flip = 1 minus the overlap in that layer."""
        axis = self.first.routes.labels.index(label)
        frames = []
        for side in (self.first, self.second):
            ids = side.routes.ids[axis][:, 0].astype(np.int64)
            frame = pl.DataFrame({"position": range(len(ids)), "expert": ids, "flip": 1.0 - self.overlap[axis]})
            frames.append(frame)
        return frames[0], frames[1]


def both(
    run: store.Run, *, other: str, version: object, sequence: int, other_sequence: int, link: object
) -> Both:  # fmt: skip
    """The sequence in both runs; the second is at a path, whose ``version`` is for caches.

    Raises:
        InputError: layers or experts of the two cannot be matched.
    """
    found = link if isinstance(link, comparison_made.Link) else None
    with store.open_run(other) as second:
        pairs = pair_layers(run, second, comparison_made.made_by(found))
        here, there = _read(run, sequence), _read(second, other_sequence)
        places = [{key: place for place, key in enumerate(routes.layers)} for routes in (here, there)]
        names = [(pair.first.layer, pair.first.step) for pair in pairs]
        sides = []
        for index, routes in enumerate((here, there)):
            keys = [(one.layer, one.step) for one in ((pair.first, pair.second)[index] for pair in pairs)]
            ids, weights = [], []
            for key, pair in zip(keys, pairs, strict=True):
                axis = places[index][key]
                chosen, held = renamed(routes.ids[axis], routes.weights[axis], pair.names[index])
                ids.append(chosen)
                weights.append(routes.weights[axis] if held is None else held)
            sides.append(replace(routes, layers=names, ids=np.stack(ids), weights=np.stack(weights).astype(np.float32)))
        found_there = [
            token_agreement(first=one, second=two) for one, two in zip(sides[0].ids, sides[1].ids, strict=True)
        ]
        return Both(
            Side(sequence_tokens(run, sequence), sides[0]),
            Side(sequence_tokens(second, other_sequence), sides[1]),
            np.stack([one.flipped for one in found_there]),
            np.stack([np.where(one.counted, one.overlap, 1.0) for one in found_there]),
        )


def rows(found: Both) -> pl.DataFrame:
    """For downloads, one row per token and layer: position, text, label, experts of each run in descending weight,
    overlap, flipped."""
    frames = []
    for axis, (layer, step) in enumerate(found.first.routes.layers):
        chosen = [side.routes.ids[axis].astype(np.int64) for side in (found.first, found.second)]
        lists = [[[expert for expert in row if expert >= 0] for row in ids.tolist()] for ids in chosen]
        frames.append(
            found.first.text.select("position", "text").with_columns(
                label=pl.lit(layer_label(layer, step)),
                experts=pl.Series(lists[0], dtype=pl.List(pl.Int64)),
                other_experts=pl.Series(lists[1], dtype=pl.List(pl.Int64)),
                overlap=pl.Series(found.overlap[axis]),
                flipped=pl.Series(found.flipped[axis]),
            )
        )
    joined = [pl.col(name).cast(pl.List(pl.String)).list.join(" ") for name in ("experts", "other_experts")]
    return pl.concat(frames).with_columns(joined)


def _read(run: store.Run, sequence: int) -> Routes:
    trace = run.selections(sequences=[sequence])
    return Routes(0, list(trace.layers), trace.ids[:, 0], trace.weights[:, 0])
