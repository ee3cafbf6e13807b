"""The trace: selections and gate weights of every token, in order: table ``route_chunk``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

import store
from profiler.capture.batch import LayerKey, RoutingBatch


class TraceRecorder:
    """Keeps what was selected until the next drain; ids in 16 bits, weights in 32, moved to the host once per batch.

    Args:
        num_experts: the largest number of experts of any layer of the model; it chooses the type of the packed ids.
        every: keep the selections of one of so many sequences.
    """

    def __init__(self, num_experts: int, every: int = 1) -> None:
        self.num_experts, self.every = num_experts, every
        self.bytes_held = 0
        self._parts: dict[tuple[LayerKey, ...], list[tuple[NDArray[np.generic], ...]]] = defaultdict(list)

    def update(self, batch: RoutingBatch) -> None:
        """Add the selections of a batch."""
        if len(batch.tokens) == 0:
            return
        ids, weights = batch.ids.to(torch.int16), batch.weights.to(torch.float32)
        sequence, position = batch.tokens.sequence, batch.tokens.position
        if self.every > 1:
            wanted = store.in_every(sequence, self.every).nonzero()[:, 0]
            if not len(wanted):
                return
            ids, weights = (part.index_select(1, wanted.to(part.device)) for part in (ids, weights))
            sequence, position = sequence[wanted], position[wanted]
        self._keep(batch.keys, sequence, position, ids, weights)

    def _keep(self, keys: Sequence[LayerKey], sequence: Tensor, position: Tensor, ids: Tensor, weights: Tensor) -> None:
        part = tuple(tensor.cpu().numpy() for tensor in (sequence, position, ids, weights))
        self._parts[tuple(keys)].append(part)
        self.bytes_held += part[2].nbytes + part[3].nbytes

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
