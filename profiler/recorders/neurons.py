"""Per neuron of each expert, sums and the maximum of the activation a that enters down_proj: ``neuron_activation``.

Five numbers per neuron: sum a^2 (HEAPr, Wanda), sum |a| (width scores, Read-ME), and of the gated activation g a the
sum of squares (CAMERA; times the squared column norm it is the layer's squared error without that neuron), the sum of
|g a| and max |g a|. Pooled over domains unless asked otherwise: vectors per domain would fill a large model's memory.
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import ExpertRows
from profiler.recorders.base import finite
from profiler.recorders.vector_sums import VectorSums, split_domains

SUMS = ("square_sum", "gated_square_sum", "absolute_sum", "gated_absolute_sum")
MAXIMA = ("gated_absolute_max",)


class NeuronRecorder(VectorSums):
    """Sums and maxima per neuron, kept on the layer's device in float64 until they are drained.

    Args:
        by_domain: keep domains apart.
    """

    table = "neuron_activation"

    def update(self, batch: ExpertRows) -> None:
        """Add the rows of one layer."""
        if batch.activation is None or not len(batch.token):
            return
        activation = batch.select(batch.activation)
        for part in split_domains(batch, by_domain=self._by_domain):
            rows = activation if part.chosen is None else activation[part.chosen]
            squares, absolutes, largest = _reduce(rows, part.gate, part.counts)
            sums = torch.cat([squares, absolutes], 1)  # shape: (experts, 4, width)
            self.add(part.key, part.counts, dict(zip(SUMS, sums.unbind(1), strict=True)), {MAXIMA[0]: largest})

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``neuron_activation``, one row per expert that saw a token."""
        return super().drain()


def _reduce(rows: Tensor, gate: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(experts, 2, width) sums of a^2 and (g a)^2, the same of |a| and |g a|, and (experts, width) max |g a|.

    Rows are sorted by expert.
    """
    gate = finite(gate.float().abs())
    parts = _reduced(rows, gate, counts)
    if not bool(torch.isfinite(parts[0]).all()):  # a look at every row would cost a pass over them
        parts = _reduced(finite(rows.float()), gate, counts)
    return parts


def _reduced(rows: Tensor, gate: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for rows of finite numbers and gates that are not negative.

    On a CPU the cost is in touching memory, so each expert's slice, which fits a cache, is squared and taken absolute
    once, and one small product with (1, g) gives the plain and the gated sum together.
    """
    experts, width = len(counts), rows.shape[1]
    squares, absolutes = (torch.zeros(experts, 2, width, device=rows.device) for _ in range(2))
    largest = torch.zeros(experts, width, device=rows.device)
    factors = torch.stack([torch.ones_like(gate), gate], 0)  # shape: (2, rows)
    start = 0
    for place, count in enumerate(counts.tolist()):
        if not count:
            continue
        part = slice(start, start := start + count)
        absolute = rows[part].float().abs()
        torch.mm(factors[:, part], absolute, out=absolutes[place])
        torch.mm(factors[:, part].square(), absolute.square(), out=squares[place])
        torch.amax(absolute.mul_(gate[part, None]), 0, out=largest[place])
    return squares, absolutes, largest
