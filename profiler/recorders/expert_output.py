"""What each expert's down projection puts out, before the gate weight: table ``expert_output``.

Sums and maxima of the L2 norm and of the largest absolute value, with the place of the largest. Super experts are found
from ``output_max`` (over all tokens of the expert) or from ``first_routed_output_max`` (over the first token of each
sequence that used it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from profiler.capture.batch import ExpertRows, Group, LayerKey, Tokens
from profiler.recorders.base import columns_of, finite, literals, row_maximum, scatter_sum
from profiler.recorders.staged import Staged

SUMS = (
    "tokens",
    "norm_sum",
    "norm_square_sum",
    "gated_norm_sum",
    "gated_norm_square_sum",
    "shifted_gated_norm_sum",
    "shifted_tokens",
    "stream_square_sum",
    "stream_gate_sum",
)
COUNTS = ("tokens", "shifted_tokens")
MAXIMA = ("output_max", "gated_output_max", "first_routed_output_max", "input_max")
PLACES = ("output_max_channel", "output_max_sequence", "output_max_position")

POSITION_BITS = 31
"""A place in the text as one number: the sequence, and the position in so many bits."""


@dataclass
class _State:
    """(experts, columns) sums, maxima (-inf = nothing seen) and the places of ``output_max``."""

    sums: NDArray[np.float64]
    maxima: NDArray[np.float64]
    places: NDArray[np.int64]


class ExpertOutputRecorder(Staged):
    """Norms and maxima of expert outputs, per expert, domain and phase."""

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[tuple[LayerKey, str, Group], _State] = {}

    def update(self, batch: ExpertRows) -> None:
        """Add the rows of one layer."""
        if not len(batch.token):
            return
        output = batch.output
        # One pass each over the outputs, without a copy of them in another type.
        norm = batch.norm
        largest = batch.select(row_maximum(output))
        entering = torch.zeros_like(norm)
        if batch.activation is not None:
            entering = batch.select(row_maximum(batch.activation))
        gate = finite(batch.gate.abs())
        groups = len(batch.tokens.groups)
        size = batch.num_experts * groups
        keys = batch.expert * groups + batch.group()  # shape: (rows,)
        gated = gate * norm
        sums = [scatter_sum(keys, values, size) for values in (None, norm, norm.square(), gated, gated.square())]
        cosine = batch.block.cosine if batch.block is not None else None
        after = batch.block.after_square if batch.block is not None else None
        if cosine is None or after is None:
            sums += [torch.zeros_like(sums[0])] * 4
        else:
            shift = (1 - cosine).clamp_min(0)[batch.token]
            sums += [scatter_sum(keys, shift * gated, size), sums[0]]
            part = finite(after.reciprocal())[batch.token]
            sums += [scatter_sum(keys, values.square() * part, size) for values in (gated, gate)]
        first = torch.where(self._first(batch), largest, -math.inf)
        maxima = [_scatter_max(keys, values, size) for values in (largest, gate * largest, first, entering)]
        places = self._places(batch, keys, largest, maxima[0])
        table = torch.stack([*sums, *(values.double() for values in maxima), *(place.double() for place in places)], 1)

        # What waits for the end of the forward must not hold the rows of the layer.
        key, tokens, table = (batch.key, batch.kind), batch.tokens, table.view(batch.num_experts, groups, -1)
        self.later(lambda: self._take(key, tokens, table.cpu().numpy()))

    def _first(self, batch: ExpertRows) -> Tensor:
        """(rows,) bool: the row is the first of its sequence for its expert, in this forward or an earlier one."""
        device = batch.token.device
        rows = batch.tokens.batch_row.to(device)[batch.token]
        position = batch.tokens.position.to(device)[batch.token]
        count = int(batch.tokens.batch_row.max()) + 1
        key = (batch.key, batch.kind)
        seen = batch.tokens.first_seen.get(key)
        if seen is None or seen.shape[0] < count:
            fresh = torch.zeros(count, batch.num_experts, dtype=torch.bool, device=device)
            if seen is not None:
                fresh[: seen.shape[0]] = seen
            seen = fresh
        pair = rows * batch.num_experts + batch.expert
        limit = torch.iinfo(torch.int64).max
        earliest = torch.full((count * batch.num_experts,), limit, device=device)
        earliest = earliest.scatter_reduce(0, pair, position, "amin")
        first = (position == earliest[pair]) & ~seen.reshape(-1)[pair]
        now = (seen.reshape(-1)[: count * batch.num_experts] | (earliest < limit)).view(count, -1)
        seen = torch.cat([now, seen[count:]])

        kept = batch.tokens.first_seen
        self.later(lambda: kept.update({key: seen}))
        return first

    @staticmethod
    def _places(batch: ExpertRows, keys: Tensor, largest: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(keys,) channel, sequence and position of the largest output of each key; of the earliest among equals.

        Equals are common: the first token of every sequence is the same.
        """
        device, never = keys.device, torch.iinfo(torch.int64).max
        when = (batch.tokens.sequence << POSITION_BITS | batch.tokens.position).to(device)[batch.token]
        when = torch.where(largest == maxima[keys], when, never)
        earliest = torch.full_like(maxima, never, dtype=torch.int64).scatter_reduce(0, keys, when, "amin")
        rows = torch.arange(len(keys), device=device)
        hits = torch.where(when == earliest[keys], rows, len(keys))
        row = torch.full_like(earliest, len(keys)).scatter_reduce(0, keys, hits, "amin").clamp_max(len(keys) - 1)
        where = row if batch.real is None else batch.real[row]
        channel = batch.output[where].abs().argmax(1)
        return channel, earliest >> POSITION_BITS, earliest & ((1 << POSITION_BITS) - 1)

    def _take(self, name: tuple[LayerKey, str], tokens: Tokens, table: NDArray[np.float64]) -> None:
        split = np.split(table, [len(SUMS), len(SUMS) + len(MAXIMA)], axis=-1)
        for entry in tokens.present:
            sums, maxima, places = (part[:, entry] for part in split)
            key = (*name, tokens.groups[entry])
            state = self._states.get(key)
            if state is None:
                self._states[key] = _State(sums.copy(), maxima.copy(), places.astype(np.int64))
                continue
            state.sums += sums
            higher = maxima[:, 0] > state.maxima[:, 0]
            higher |= (maxima[:, 0] == state.maxima[:, 0]) & earlier(places[:, 1:], state.places[:, 1:])
            state.places[higher] = places[higher].astype(np.int64)
            np.maximum(state.maxima, maxima, out=state.maxima)

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_output``, one row per expert that saw a token."""
        frames = []
        for (key, kind, group), state in self._states.items():
            frame = pl.DataFrame(
                {
                    "expert": range(len(state.sums)),
                    **{name: state.sums[:, index] for index, name in enumerate(SUMS)},
                    **{name: state.maxima[:, index] for index, name in enumerate(MAXIMA)},
                    **{name: state.places[:, index] for index, name in enumerate(PLACES)},
                }
            ).filter(pl.col("tokens") > 0)
            maxima = pl.col(MAXIMA)
            frames.append(
                frame.with_columns(
                    pl.col(COUNTS).cast(pl.Int64),
                    pl.when(maxima.is_infinite() & (maxima < 0)).then(None).otherwise(maxima).name.keep(),
                    **literals({**columns_of(key, group), "kind": kind}),
                )
            )
        self._states.clear()
        return {"expert_output": pl.concat(frames, how="vertical_relaxed")} if frames else {}


def earlier(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether (..., 2) sequence and position stand before others in the text: of equal maxima, the first is named."""
    before: NDArray[np.bool_] = (first[..., 0] < second[..., 0]) | (
        (first[..., 0] == second[..., 0]) & (first[..., 1] < second[..., 1])
    )
    return before


def _scatter_max(keys: Tensor, values: Tensor, size: int) -> Tensor:
    """(size,) largest value by key, -inf where there is none."""
    return torch.full((size,), -math.inf, device=values.device).scatter_reduce(0, keys, values, "amax")
