"""Per neuron of each expert, the sum of squares of the activation that enters down_proj: table ``neuron_activation``.

Pooled over domains, apart by phase: one vector per expert and domain would fill the memory of large models.
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import ExpertRows, LayerKey
from profiler.recorders.base import finite
from profiler.recorders.staged import Staged


class NeuronRecorder(Staged):
    """Sums of squared activations, kept on the layer's device in float64 until they are drained."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[tuple[LayerKey, str, str], tuple[Tensor, Tensor]] = {}

    def update(self, batch: ExpertRows) -> None:
        """Add the rows of one layer."""
        if batch.activation is None or not len(batch.token):
            return
        phases = {batch.tokens.groups[entry][1] for entry in batch.tokens.present}
        assert len(phases) == 1, "a forward is either prompt or decode"
        counts = torch.bincount(batch.expert, minlength=batch.num_experts)
        squares = finite(_sum_squares(batch.select(batch.activation), counts))
        key = (batch.key, batch.kind, phases.pop())

        def take() -> None:
            # Not in place: the first batch may have run under inference_mode and this one not.
            tokens, sums = self._sums.get(key, (0, 0.0))
            self._sums[key] = (tokens + counts, sums + squares.double())

        self.later(take)

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``neuron_activation``, one row per expert that saw a token."""
        frames = []
        for ((layer, step), kind, phase), (tokens, sums) in self._sums.items():
            used = tokens.nonzero()[:, 0].cpu()
            frames.append(
                pl.DataFrame(
                    {
                        "expert": used.numpy(),
                        "tokens": tokens.cpu()[used].numpy(),
                        "square_sum": pl.Series(sums.cpu()[used].tolist(), dtype=pl.List(pl.Float64)),
                    }
                ).with_columns(layer=layer, step=step, kind=pl.lit(kind), phase=pl.lit(phase))
            )
        self._sums.clear()
        return {"neuron_activation": pl.concat(frames)} if frames else {}


def _sum_squares(rows: Tensor, counts: Tensor) -> Tensor:
    """(experts, width) float32 sums of squares of rows that are sorted by expert."""
    if rows.device.type != "cpu":
        expert = torch.repeat_interleave(torch.arange(len(counts), device=rows.device), counts, output_size=len(rows))
        sums = torch.zeros(len(counts), rows.shape[1], device=rows.device)
        return sums.index_add_(0, expert, rows.float().square_())
    # On a CPU the cost is in touching memory: slices that fit a cache are three times as fast as one large index_add.
    sums = torch.zeros(len(counts), rows.shape[1])
    for place, part in enumerate(torch.split(rows, counts.tolist())):
        if len(part):
            part = part.float()
            torch.sum(part * part, dim=0, out=sums[place])
    return sums
