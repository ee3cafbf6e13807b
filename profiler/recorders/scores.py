"""The largest router scores of every token, with the logsumexp of all: table ``score_chunk``."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from profiler.capture.batch import LayerKey, RoutingBatch
from profiler.recorders.text import chunk_edges

STEPS = 65535
"""Steps between the smallest and the largest logit of a chunk."""


class ScoreRecorder:
    """Keeps the m largest logits of every token: 3 bytes each, and 4 for their logsumexp.

    Args:
        count: m; a router with fewer experts gives all of them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._parts: dict[LayerKey, list[tuple[NDArray[np.generic], ...]]] = {}

    def update(self, batch: RoutingBatch) -> None:
        """Add the scores of a batch; routers that show no logits add nothing."""
        if not len(batch.tokens) or batch.logits is None:
            return
        logits = batch.logits[..., : batch.num_experts]
        largest = logits.topk(min(self.count, batch.num_experts), dim=-1)
        partition = torch.logsumexp(batch.logits, -1).cpu().numpy()
        ids, values = largest.indices.cpu().numpy().astype(np.uint16), largest.values.float().cpu().numpy()
        sequence, position = batch.tokens.sequence.cpu().numpy(), batch.tokens.position.cpu().numpy()
        for index, key in enumerate(batch.keys):
            part = (sequence, position, ids[index], values[index], partition[index])
            self._parts.setdefault(key, []).append(part)

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``score_chunk``: one row per layer and chunk of a sequence."""
        parts, self._parts = self._parts, {}
        frames = [
            _pack(key, *(np.concatenate(column) for column in zip(*rows, strict=True))) for key, rows in parts.items()
        ]
        return {"score_chunk": pl.concat(frames)} if frames else {}


def _pack(
    key: LayerKey,
    sequence: NDArray[np.generic],
    position: NDArray[np.generic],
    ids: NDArray[np.generic],
    values: NDArray[np.generic],
    partition: NDArray[np.generic],
) -> pl.DataFrame:
    order = np.lexsort((position, sequence))
    sequence, position = sequence[order].astype(np.int64), position[order].astype(np.int64)
    ids, values, partition = ids[order], np.nan_to_num(values[order]), np.nan_to_num(partition[order])
    edges = chunk_edges(sequence, position)
    rows = []
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = values[start:end]
        low, high = float(part.min()), float(part.max())
        steps = np.rint((part - low) / max(high - low, np.finfo(np.float32).tiny) * STEPS)
        rows.append(
            {
                "sequence": int(sequence[start]),
                "start": int(position[start]),
                "width": ids.shape[1],
                "low": low,
                "high": high,
                "experts": ids[start:end].reshape(-1),
                "scores": steps.astype(np.uint16).reshape(-1),
                "log_partition": partition[start:end].astype(np.float32),
            }
        )
    return pl.DataFrame(rows).with_columns(layer=pl.lit(key[0]), step=pl.lit(key[1]))
