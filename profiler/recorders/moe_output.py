"""What the routed experts of a layer add to the residual stream: table ``moe_output``."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from profiler.capture.batch import BlockBatch, Group, LayerKey, Tokens
from profiler.recorders.base import columns_of, finite, row_maximum, row_norm, scatter_sum
from profiler.recorders.staged import Staged

_SUMS = ("tokens", "output_square_sum", "residual_tokens", "residual_square_sum", "cosine_sum")
_MAXIMA = ("output_max", "residual_max")
_COUNTS = ("tokens", "residual_tokens")


class MoEOutputRecorder(Staged):
    """Sums and maxima of the experts' sum y and of the residual stream r before it, by domain and phase."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[LayerKey, Group], NDArray[np.float64]] = {}

    def update(self, batch: BlockBatch) -> None:
        """Add one layer of a forward."""
        tokens = batch.tokens
        if not len(tokens):
            return
        device, size = batch.output.device, len(tokens.groups)
        group = tokens.group.to(device)
        sums = [None, tokens.select(row_norm(batch.output)).square()]
        maxima = [tokens.select(row_maximum(batch.output))]
        if batch.residual is not None and batch.cosine is not None:
            norm = tokens.select(row_norm(batch.residual)).square()
            sums += [torch.ones_like(norm), norm, finite(batch.cosine)]
            maxima.append(tokens.select(row_maximum(batch.residual)))
        columns = [scatter_sum(group, values, size) for values in sums]
        columns += [torch.zeros_like(columns[0])] * (len(_SUMS) - len(sums))
        nothing = torch.full((size,), -math.inf, device=device)
        largest = [nothing.scatter_reduce(0, group, values, "amax").double() for values in maxima]
        largest += [nothing.double()] * (len(_MAXIMA) - len(maxima))
        table = torch.stack([*columns, *largest], 1)
        layer = batch.key  # what waits for the end of the forward must not hold the rows of the layer
        self.later(lambda: self._take(layer, tokens, table.cpu().numpy()))

    def _take(self, layer: LayerKey, tokens: Tokens, table: NDArray[np.float64]) -> None:
        for entry in tokens.present:
            key, new = (layer, tokens.groups[entry]), table[entry]
            old = self._rows.get(key)
            if old is not None:
                cut = len(_SUMS)
                new = np.concatenate([old[:cut] + new[:cut], np.maximum(old[cut:], new[cut:])])
            self._rows[key] = new

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``moe_output``, one row per layer, domain and phase."""
        rows = []
        for name, values in self._rows.items():
            row = dict(zip((*_SUMS, *_MAXIMA), (None if v == -math.inf else v for v in values.tolist()), strict=True))
            rows.append({**columns_of(*name), **row})
        self._rows.clear()
        if not rows:
            return {}
        frame = pl.DataFrame(rows, infer_schema_length=None).filter(pl.col("tokens") > 0)
        return {"moe_output": frame.with_columns(pl.col(_COUNTS).cast(pl.Int64))}
