"""The largest router scores of every token, with the logsumexp of all: table ``score_chunk``."""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

import store
from profiler.capture.batch import LayerKey, RoutingBatch

NONE = 65535
"""The packed id that means "no expert"."""

MORE_THAN_K = 8
"""How many scores beyond the selection are kept where nobody says how many."""


_MIX = 0x45D9F3B
"""An odd number by which the bits of a sequence's number are mixed twice."""


def chosen_sequences(sequence: Tensor, every: int) -> Tensor:
    """Which sequences are among the one of ``every`` whose scores are kept: (n,) bool of their numbers (n,) int64.

    By a hash of the number, so that it is the same in every session, and domains that take turns are hit alike: even
    steps would miss some of them. Sequence 0 is one.
    """
    mixed = sequence & 0xFFFFFFFF
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * _MIX) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)) * every < 1 << 32


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
        wanted = chosen_sequences(batch.tokens.sequence, self.every).nonzero()[:, 0]
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
