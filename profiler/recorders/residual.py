"""The residual stream after each decoder layer: table ``residual``. Massive activations show here."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from profiler.capture.batch import Group, ResidualBatch, Tokens
from profiler.recorders.base import finite, row_maximum, row_norm, scatter_sum
from profiler.recorders.expert_output import POSITION_BITS, earlier
from profiler.recorders.staged import Staged

_COLUMNS = (
    "tokens",
    "norm_sum",
    "input_cosine_sum",
    "absolute_max",
    "later_max",
    "channel",
    "sequence",
    "position",
    "median_there",
)


class ResidualRecorder(Staged):
    """Norms and maxima of the hidden state after each decoder layer, per domain and phase."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[int, Group], NDArray[np.float64]] = {}

    def update(self, batch: ResidualBatch) -> None:
        """Add the hidden states after one layer; -inf stands for "no token" in maxima."""
        tokens = batch.tokens
        if not len(tokens):
            return
        device, size = batch.hidden.device, len(tokens.groups)
        norm = tokens.select(row_norm(batch.hidden))
        largest = tokens.select(row_maximum(batch.hidden))
        group, position = tokens.group.to(device), tokens.position.to(device)
        empty = torch.full((size,), -math.inf, device=device)
        top = empty.scatter_reduce(0, group, largest, "amax")
        later = empty.scatter_reduce(0, group, torch.where(position > 0, largest, -math.inf), "amax")
        # Of equal maxima the earliest in the text: the first token of every sequence is the same.
        never = torch.iinfo(torch.int64).max
        when = (tokens.sequence << POSITION_BITS | tokens.position).to(device)
        when = torch.where(largest == top[group], when, never)
        earliest = torch.full((size,), never, device=device).scatter_reduce(0, group, when, "amin")
        index = torch.arange(len(tokens), device=device)
        hits = torch.where(when == earliest[group], index, len(tokens))
        first = torch.full((size,), len(tokens), device=device).scatter_reduce(0, group, hits, "amin")
        first = first.clamp_max(len(tokens) - 1)
        there = batch.hidden[first if tokens.keep is None else tokens.keep.to(device)[first]].abs().float()
        columns = [
            scatter_sum(group, None, size),
            scatter_sum(group, norm, size),
            scatter_sum(group, self._cosine(batch), size),
            top,
            later,
            there.argmax(1) % batch.width,
            tokens.sequence.to(device)[first],
            position[first],
            finite(there.median(1).values),
        ]
        table = torch.stack([column.double() for column in columns], 1)

        layer = batch.layer  # what waits for the end of the forward must not hold the hidden states
        self.later(lambda: self._take(layer, tokens, table.cpu().numpy()))

    @staticmethod
    def _cosine(batch: ResidualBatch) -> torch.Tensor:
        """(real tokens,) cosine of what entered the layer and what left it; NaN where it was not seen."""
        if batch.entered is None:
            return torch.full((len(batch.tokens),), math.nan, device=batch.hidden.device)
        cosine = torch.nn.functional.cosine_similarity(batch.entered.float(), batch.hidden.float(), dim=1)
        return batch.tokens.select(finite(cosine))

    def _take(self, layer: int, tokens: Tokens, table: NDArray[np.float64]) -> None:
        for entry in tokens.present:
            key, new = (layer, tokens.groups[entry]), table[entry]
            old = self._rows.get(key)
            if old is None:
                self._rows[key] = new.copy()
                continue
            larger = new[3] > old[3] or (new[3] == old[3] and earlier(new[6:8], old[6:8]))
            merged = np.where(larger, new, old)  # the places of the larger maximum
            merged[:3] = old[:3] + new[:3]
            merged[3:5] = np.maximum(old[3:5], new[3:5])
            self._rows[key] = merged

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``residual``, one row per layer, domain and phase that saw a token."""
        rows = []
        for (layer, (domain, phase)), values in self._rows.items():
            row = dict(zip(_COLUMNS, values.tolist(), strict=True))
            row["later_max"] = None if row["later_max"] == -math.inf else row["later_max"]
            row["input_cosine_sum"] = None if math.isnan(row["input_cosine_sum"]) else row["input_cosine_sum"]
            rows.append({"layer": layer, "domain": domain, "phase": phase, **row})
        self._rows.clear()
        return {"residual": pl.DataFrame(rows, infer_schema_length=None).filter(pl.col("tokens") > 0)} if rows else {}
