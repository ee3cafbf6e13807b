"""The largest router scores of every token, with the logsumexp of all: table ``score_chunk``."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

import store
from profiler.capture.batch import LayerKey, RoutingBatch

NONE = 65535
"""The packed id that means "no expert"."""

MORE_THAN_K = 8
"""How many scores beyond the selection are kept where nobody says how many."""


class ScoreRecorder:
    """Keeps the m largest logits of every token: 3 bytes each, and 4 for their logsumexp.

    Args:
        count: m, or -1 for k + 8; a router with fewer experts gives all of them.
        every: keep them of one of so many sequences.
    """

    def __init__(self, count: int = -1, every: int = 1) -> None:
        self.count, self.every = count, every
        self.bytes_held = 0
        self._parts: dict[LayerKey, list[tuple[NDArray[np.generic], ...]]] = {}

    def update(self, batch: RoutingBatch) -> None:
        """Add the scores of a batch; routers that show no logits add nothing.

        A token with logits that are no finite numbers has no experts here, and its logsumexp says so.
        """
        if not len(batch.tokens) or batch.logits is None:
            return
        wanted = store.in_every(batch.tokens.sequence, self.every).nonzero()[:, 0]
        if not len(wanted):
            return
        whole = batch.logits if self.every == 1 else batch.logits.index_select(1, wanted.to(batch.logits.device))
        logits = whole[..., : batch.num_experts]
        count = self.count if self.count > 0 else batch.ids.shape[-1] + MORE_THAN_K
        largest = logits.topk(min(count, batch.num_experts), dim=-1)
        partition = torch.logsumexp(whole, -1)
        sound = torch.isfinite(partition) & torch.isfinite(largest.values).all(-1)
        ids = torch.where(sound[..., None], largest.indices, NONE).cpu().numpy().astype(np.uint16)
        values = torch.where(sound[..., None], largest.values, 0.0).cpu().numpy()
        totals = torch.where(sound, partition, torch.nan).cpu().numpy()
        sequence, position = (of[wanted].cpu().numpy() for of in (batch.tokens.sequence, batch.tokens.position))
        for index, key in enumerate(batch.keys):
            part = (sequence, position, ids[index], values[index], totals[index])
            self._parts.setdefault(key, []).append(part)
        self.bytes_held += ids.nbytes + values.nbytes + totals.nbytes

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``score_chunk``: one row per layer and chunk of a sequence."""
        parts, self._parts, self.bytes_held = self._parts, {}, 0
        frames = []
        for (layer, step), rows in parts.items():
            sequence, position, ids, logits, totals = (np.concatenate(column) for column in zip(*rows, strict=True))
            frames.append(
                store.pack_scores(
                    layer=layer,
                    step=step,
                    sequence=sequence,
                    position=position,
                    ids=ids,
                    logits=logits,
                    log_partition=totals,
                )
            )
        return {"score_chunk": pl.concat(frames)} if frames else {}
