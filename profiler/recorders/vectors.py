"""Per channel, what enters and leaves each expert: table ``expert_vector``.

The sum of squared inputs over an expert's own tokens gives the Wanda norms of its first projection; the sums of its
outputs, plain and gated, give its mean (what a dropped expert may be replaced by).
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import ExpertRows
from profiler.recorders.base import finite
from profiler.recorders.vector_sums import DomainRows, VectorSums, split_domains


class VectorRecorder(VectorSums):
    """Sums per channel, kept on the layer's device in float64 until they are drained."""

    table = "expert_vector"

    def update(self, batch: ExpertRows) -> None:
        """Add the rows of one layer."""
        if not len(batch.token):
            return
        output = batch.select(batch.output)
        squares = None
        if batch.inputs is not None:
            squares = finite(batch.tokens.select(batch.inputs).float()).square()  # shape: (tokens, width)
        for part in split_domains(batch, by_domain=self._by_domain):
            rows = output if part.chosen is None else output[part.chosen]
            plain, gated = _output_sums(rows, part).unbind(1)
            sums = {"output_sum": plain, "gated_output_sum": gated}
            if squares is not None:
                sums["input_square_sum"] = _membership(part, batch.num_experts, len(batch.tokens)) @ squares
            self.add(part.key, part.counts, sums)

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_vector``, one row per expert that saw a token."""
        return super().drain()


def _output_sums(rows: Tensor, part: DomainRows) -> Tensor:
    """(experts, 2, width) sums of the outputs and of the gated outputs, of rows sorted by expert."""
    gate = finite(part.gate.float())
    factors = torch.stack([torch.ones_like(gate), gate], 0)
    sums = _products(rows, factors, part.counts)
    if not bool(torch.isfinite(sums).all()):  # a look at every row would cost a pass over them
        sums = finite(_products(finite(rows.float()), factors, part.counts))
    return sums


def _products(rows: Tensor, factors: Tensor, counts: Tensor) -> Tensor:
    """(experts, factors, width) product of the factors (factors, rows) with each expert's rows."""
    sums = torch.zeros(len(counts), len(factors), rows.shape[1], device=rows.device)
    start = 0
    for place, count in enumerate(counts.tolist()):
        if count:
            end = start + count
            torch.mm(factors[:, start:end], rows[start:end].float(), out=sums[place])
            start = end
    return sums


def _membership(part: DomainRows, experts: int, tokens: int) -> Tensor:
    """(experts, tokens) 1 where a token went through an expert: a product with it sums over each expert's tokens."""
    member = torch.zeros(experts, tokens, device=part.token.device)
    member[part.expert, part.token] = 1.0
    return member
