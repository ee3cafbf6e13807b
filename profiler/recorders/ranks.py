"""How often each expert was first, second, ... choice, and how sure the router was: table ``expert_rank``.

TCESS (PreMoe) is ``logit_sum`` over the leading ranks, divided by the tokens of ``router_load``; the eighths let the
confidence that PreMoe asks for be chosen later. Ranks are those of the selection that the model made: where a bias
steers the choice, an expert with a large logit that was not chosen has no rank.
"""

from __future__ import annotations

import polars as pl
import torch

from profiler.capture.batch import RoutingBatch
from profiler.recorders.base import Sums, columns_of, double_lists, integer_lists, literals, scatter_sum

EIGHTHS = 8
"""Equal buckets of the softmax over the chosen logits."""


class RankRecorder:
    """Counts, gate weights and logits per expert and rank, and per expert and confidence, by domain and phase."""

    def __init__(self) -> None:
        self._ranks = Sums()
        self._confidence = Sums()

    def update(self, batch: RoutingBatch) -> None:
        """Add the selections of a batch."""
        layers, tokens, k = batch.ids.shape
        if tokens == 0:
            return
        device, experts, groups = batch.ids.device, batch.num_experts, len(batch.tokens.groups)
        group = batch.tokens.group.to(device)
        layer = torch.arange(layers, device=device)
        place = torch.where(batch.ids >= 0, batch.ids, experts)  # the last place is for "no expert"
        pair = (layer[:, None] * groups + group)[..., None] * (experts + 1) + place  # shape: (layers, tokens, k)
        size = layers * groups * (experts + 1)
        weights = torch.nan_to_num(batch.weights, nan=0.0, posinf=0.0, neginf=0.0)
        logits = confidence = torch.zeros_like(weights)
        if batch.logits is not None:
            logits = torch.nan_to_num(batch.logits.gather(-1, batch.ids.clamp_min(0)), nan=0.0, posinf=0.0, neginf=0.0)
            confidence = torch.where(batch.ids >= 0, logits, -torch.inf).softmax(-1).nan_to_num_(nan=0.0)
        rank = torch.arange(k, device=device)
        by_rank = (pair * k + rank).reshape(-1)
        eighth = (confidence * EIGHTHS).long().clamp_(0, EIGHTHS - 1)
        by_eighth = (pair * EIGHTHS + eighth).reshape(-1)
        ranks = [scatter_sum(by_rank, part, size * k) for part in (None, weights.reshape(-1), logits.reshape(-1))]
        sure = [scatter_sum(by_eighth, part, size * EIGHTHS) for part in (None, logits.reshape(-1))]
        shape = (layers, groups, experts + 1, -1)
        host = torch.stack([part.view(shape) for part in ranks], 2).cpu().numpy()[..., :experts, :]
        bins = torch.stack([part.view(shape) for part in sure], 2).cpu().numpy()[..., :experts, :]
        for index, key in enumerate(batch.keys):
            for entry in batch.tokens.present:
                name = (key, batch.tokens.groups[entry])
                self._ranks.add(name, host[index, entry])
                if batch.logits is not None:
                    self._confidence.add(name, bins[index, entry])

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_rank``, one row per expert."""
        confidence = dict(self._confidence.drain())
        parts = []
        for name, (tokens, gates, logits) in self._ranks.drain():
            columns = {"tokens": integer_lists(tokens), "gate_sum": double_lists(gates)}
            if name in confidence:
                counts, sums = confidence[name]
                columns |= {"logit_sum": double_lists(logits), "confidence_tokens": integer_lists(counts)}
                columns |= {"confidence_logit_sum": double_lists(sums)}
            part = pl.DataFrame({"expert": range(len(tokens)), **columns})
            parts.append(part.with_columns(**literals(columns_of(*name))))
        return {"expert_rank": pl.concat(parts, how="diagonal_relaxed")} if parts else {}
