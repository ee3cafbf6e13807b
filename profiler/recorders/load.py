"""How often and how strongly each expert was used: table ``expert_load``."""

from __future__ import annotations

import polars as pl
import torch

from profiler.capture.batch import RoutingBatch
from profiler.recorders.base import Sums, columns_of, literals, scatter_sum

_SELECTED = ("tokens", "first_choices", "first_positions", "gate_sum", "gate_square_sum", "gate_share_sum")


class LoadRecorder:
    """Counts selections and sums gate weights, per expert, domain and phase.

    Sums over what the router did (``probability_sum`` and logits) come from
    :class:`~profiler.recorders.router.RouterRecorder`, which has the logits at hand; the tables are merged by key.
    """

    def __init__(self) -> None:
        self._sums = Sums()

    def update(self, batch: RoutingBatch) -> None:
        """Add the selections of a batch; a weight that is no finite number counts as a selection without weight."""
        layers, tokens, k = batch.ids.shape
        if tokens == 0:
            return
        device, experts, groups = batch.ids.device, batch.num_experts, len(batch.tokens.groups)
        group = batch.tokens.group.to(device)
        layer = torch.arange(layers, device=device)
        # shape: (layers, tokens, k); experts + 1 places, the last for "no expert"
        place = torch.where(batch.ids >= 0, batch.ids, experts)
        keys = ((layer[:, None] * groups + group)[..., None] * (experts + 1) + place).reshape(-1)
        weights = torch.nan_to_num(batch.weights, nan=0.0, posinf=0.0, neginf=0.0)
        share = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        size = layers * groups * (experts + 1)
        first = keys.view(layers, tokens, k)
        starts = (batch.tokens.position.to(device) == 0).nonzero()[:, 0]
        sums = torch.stack(
            [
                scatter_sum(keys, None, size),
                scatter_sum(first[:, :, 0].reshape(-1), None, size),
                scatter_sum(first[:, starts].reshape(-1), None, size),
                scatter_sum(keys, weights.reshape(-1), size),
                scatter_sum(keys, weights.square().reshape(-1), size),
                scatter_sum(keys, share.reshape(-1), size),
            ],
            dim=-1,
        )
        host = sums.view(layers, groups, experts + 1, len(_SELECTED))[:, :, :experts].cpu().numpy()
        for index, key in enumerate(batch.keys):
            for entry in batch.tokens.present:
                self._sums.add((key, batch.tokens.groups[entry]), host[index, entry])

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_load``, one row per expert that could have been selected, also where it was not."""
        parts = []
        for (key, group), values in self._sums.drain():
            columns = {name: values[:, index] for index, name in enumerate(_SELECTED)}
            part = pl.DataFrame({"expert": range(len(values)), **columns})
            counts = [pl.col(name).cast(pl.Int64) for name in _SELECTED[:3]]
            parts.append(part.with_columns(*counts, **literals(columns_of(key, group)), kind=pl.lit("routed")))
        return {"expert_load": pl.concat(parts)} if parts else {}
