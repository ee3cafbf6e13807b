"""The experts of successive tokens of one sequence as arrays: what the token strip and the measures read."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from app.frames.axes import layer_label

ROUTES = {
    "position": pl.Int64,
    "layer": pl.Int32,
    "step": pl.Int32,
    "label": pl.String,
    "rank": pl.Int32,
    "expert": pl.Int32,
    "weight": pl.Float64,
}


@dataclass(frozen=True)
class Routes:
    """Selections of the tokens from ``start`` on.

    Attributes:
        start: position of the first token.
        layers: (layer, step) of each entry of axis 0.
        ids: (layers, tokens, k) int16 in descending gate weight, -1 = none.
        weights: same shape, float32 gate weights; 0 = none.
    """

    start: int
    layers: list[tuple[int, int]]
    ids: NDArray[np.int16]
    weights: NDArray[np.float32]

    @property
    def count(self) -> int:
        """Tokens."""
        return int(self.ids.shape[1])

    @cached_property
    def labels(self) -> list[str]:
        """Names of the layers."""
        return [layer_label(layer, step) for layer, step in self.layers]

    def of(self, label: str) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """ids and weights of one layer, (tokens, k) each."""
        axis = self.labels.index(label)
        return self.ids[axis], self.weights[axis]

    @cached_property
    def parts(self) -> NDArray[np.float32]:
        """(layers, tokens, k) each weight over the sum of its token's weights; 0 where there is none."""
        total = self.weights.sum(axis=-1, keepdims=True)
        return np.divide(self.weights, total, out=np.zeros_like(self.weights), where=total > 0)

    @cached_property
    def packed(self) -> dict[str, object]:
        """For a browser: ``ids`` and ``parts`` (8 bits) in base64, the bytes of an id, and its number for "none"."""
        wide = int(self.ids.max(initial=0)) >= 255
        none = 65535 if wide else 255
        ids = np.where(self.ids < 0, none, self.ids).astype("<u2" if wide else "u1")
        parts = np.rint(self.parts * 255).astype(np.uint8)
        return {
            "labels": self.labels,
            "width": int(self.ids.shape[2]),
            "wide": wide,
            "ids": base64.b64encode(ids.tobytes()).decode(),
            "parts": base64.b64encode(parts.tobytes()).decode(),
        }

    def frame(self, label: str | None = None) -> pl.DataFrame:
        """One row per token, layer and rank, of one layer or of all: the columns of :data:`ROUTES`."""
        chosen = range(len(self.layers)) if label is None else [self.labels.index(label)]
        axes = np.array(list(chosen), np.int64)
        axis, position, rank = np.nonzero(self.ids[axes] >= 0)
        layers = np.array(self.layers, np.int32).reshape(-1, 2)[axes]
        names = (
            pl.Series(self.labels, dtype=pl.String).gather(axes[axis]) if len(axis) else pl.Series([], dtype=pl.String)
        )
        return pl.DataFrame(
            {
                "position": position + self.start,
                "layer": layers[axis, 0],
                "step": layers[axis, 1],
                "label": names,
                "rank": rank.astype(np.int32),
                "expert": self.ids[axes][axis, position, rank].astype(np.int32),
                "weight": self.weights[axes][axis, position, rank].astype(np.float64),
            },
            schema=ROUTES,
        )
