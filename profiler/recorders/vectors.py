"""Per channel, what enters and leaves each expert: table ``expert_vector``.

The sum of squared inputs over an expert's own tokens gives the Wanda norms of its first projection, their largest
absolute values are what smoothing moves into the weights (EAQuant, SmoothQuant); the sums of its outputs, plain and
gated, give its mean (what a dropped expert may be replaced by).
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import ExpertRows
from profiler.recorders.base import finite
from profiler.recorders.vector_sums import DomainRows, VectorSums, split_domains


class VectorRecorder(VectorSums):
    """Sums and maxima per channel, kept on the layer's device in float64 until they are drained."""

    table = "expert_vector"

    def update(self, batch: ExpertRows) -> None:
        """Add the rows of one layer."""
        if not len(batch.token):
            return
        output = batch.select(batch.output)
        inputs = None
        if batch.inputs is not None:
            inputs = finite(batch.tokens.select(batch.inputs).float())  # shape: (tokens, width)
        squares = None if inputs is None else inputs.square()
        for part in split_domains(batch, by_domain=self._by_domain):
            rows = output if part.chosen is None else output[part.chosen]
            plain, gated = _output_sums(rows, part).unbind(1)
            sums = {"output_sum": plain, "gated_output_sum": gated}
            maxima = {}
            if inputs is not None and squares is not None:
                sums["input_square_sum"] = _membership(part, batch.num_experts, len(batch.tokens)) @ squares
                maxima["input_max"] = _input_maxima(inputs, part)
            self.add(part.key, part.counts, sums, maxima)

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


def _input_maxima(inputs: Tensor, part: DomainRows) -> Tensor:
    """(experts, width) largest |x| of each channel over an expert's tokens; 0 where it has none."""
    largest = torch.zeros(len(part.counts), inputs.shape[1], device=inputs.device)
    start = 0
    for place, count in enumerate(part.counts.tolist()):
        if count:
            rows = inputs[part.token[start : start + count]]
            torch.amax(rows.abs_(), 0, out=largest[place])
            start += count
    return largest


def _membership(part: DomainRows, experts: int, tokens: int) -> Tensor:
    """(experts, tokens) 1 where a token went through an expert: a product with it sums over each expert's tokens."""
    member = torch.zeros(experts, tokens, device=part.token.device)
    member[part.expert, part.token] = 1.0
    return member
