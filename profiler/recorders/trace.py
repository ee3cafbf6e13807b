"""The trace: selections and gate weights of every token, in order: table ``route_chunk``."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

import store
from profiler.capture.batch import LayerKey, RoutingBatch


class TraceRecorder:
    """Keeps what was selected until the next drain; ids in 16 bits, weights in 32, moved to the host once per batch.

    Args:
        num_experts: the largest number of experts of any layer of the model; it chooses the type of the packed ids.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.bytes_held = 0
        self._parts: dict[tuple[LayerKey, ...], list[tuple[NDArray[np.generic], ...]]] = defaultdict(list)

    def update(self, batch: RoutingBatch) -> None:
        """Add the selections of a batch."""
        if len(batch.tokens) == 0:
            return
        ids = batch.ids.to(torch.int16).cpu().numpy()
        weights = batch.weights.to(torch.float32).cpu().numpy()
        sequence, position = batch.tokens.sequence.cpu().numpy(), batch.tokens.position.cpu().numpy()
        self._parts[tuple(batch.keys)].append((sequence, position, ids, weights))
        self.bytes_held += ids.nbytes + weights.nbytes

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``route_chunk``: one row per layer and chunk of a sequence."""
        frames = []
        for keys, parts in self._parts.items():
            width = max(_used_columns(part[2]) for part in parts)
            sequence = np.concatenate([part[0] for part in parts])
            position = np.concatenate([part[1] for part in parts])
            for index, (layer, step) in enumerate(keys):
                frames.append(
                    store.pack_trace(
                        layer=layer,
                        step=step,
                        sequence=sequence,
                        position=position,
                        ids=_joined([part[2][index] for part in parts], width, -1),
                        weights=_joined([part[3][index] for part in parts], width, 0),
                        num_experts=self.num_experts,
                    )
                )
        self._parts.clear()
        self.bytes_held = 0
        return {"route_chunk": pl.concat(frames)} if frames else {}


def _used_columns(ids: NDArray[Any]) -> int:
    """Columns up to the last one that holds an expert: a router that may take all experts takes few at a time."""
    used = np.flatnonzero((ids >= 0).any((0, 1)))
    return int(used.max(initial=-1)) + 1


def _joined(parts: list[NDArray[np.generic]], width: int, none: int) -> NDArray[Any]:
    """(tokens, width) parts one below the other, where k may have changed between them; at least one column."""
    wide = [np.pad(part, ((0, 0), (0, max(0, width - part.shape[1]))), constant_values=none) for part in parts]
    return np.concatenate([part[:, : max(width, 1)] for part in wide])
