"""The statistics of level routing from blocks of an imported trace or of imported counts: what recorders add up from a
live model, without torch. Sums in int64 and float64, per domain and phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from profiler.metrics._trace import available_cores

MAX_PAIR_EXPERTS = 1024
"""Layers with more experts get no pairs, as in a live collection."""

_LOAD = ("tokens", "first_choices", "first_positions", "gate_sum", "gate_square_sum", "gate_share_sum")
_ENTROPY, _SELECTIONS, _ROUTED = 0, 1, 2

Group = tuple[str, str]
"""(domain, phase)."""


@dataclass
class _Sums:
    """Sums of one domain and phase over all layers."""

    load: NDArray[np.float64]
    rank_tokens: NDArray[np.int64]
    rank_gates: NDArray[np.float64]
    router: NDArray[np.float64]


@dataclass
class TraceStatistics:
    """Adds up blocks of a trace; :meth:`frames` gives the tables.

    Args:
        layers: of the recording.
        top_k: width of the blocks.
        has_weights: whether the source keeps gate weights; without, the columns that need them are null.
    """

    layers: Sequence[store.LayerInfo]
    top_k: int
    has_weights: bool
    _groups: dict[Group, _Sums] = field(default_factory=dict)
    _pairs: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # by phase; domains are pooled

    def __post_init__(self) -> None:
        self._parts = np.zeros((len(self.layers), self.layers[0].num_experts, store.NUM_PARTS, 2), np.float64)

    def add(
        self,
        *,
        ids: NDArray[np.int16],
        weights: NDArray[np.float32],
        sequence: NDArray[np.int64],
        position: NDArray[np.int64],
        groups: Sequence[Group],
        group: NDArray[np.int64],
    ) -> None:
        """Add tokens: ids, weights (layers, tokens, k); the others (tokens,), group an index into groups."""
        part = np.asarray(store.part_of_sequence(sequence), np.int64)
        first = position == 0
        for number, name in enumerate(groups):
            chosen = group == number
            if not chosen.any():
                continue
            sums = self._groups.setdefault(name, self._empty())
            everything = bool(chosen.all())
            mine = ids if everything else np.ascontiguousarray(ids[:, chosen])
            gates = weights if everything else np.ascontiguousarray(weights[:, chosen])
            self._add_group(sums, self._pairs_of(name[1]), mine, gates, first[chosen], part[chosen])

    def frames(self) -> dict[str, pl.DataFrame]:
        """Tables expert_load, router_load, expert_rank, expert_pair and expert_part."""
        parts: dict[str, list[pl.DataFrame]] = {"expert_load": [], "router_load": [], "expert_rank": []}
        for (domain, phase), sums in self._groups.items():
            for axis, layer in enumerate(self.layers):
                place = {"layer": layer.layer, "step": layer.step, "domain": domain, "phase": phase}
                parts["expert_load"].append(self._load_frame(sums.load[axis], place))
                parts["router_load"].append(self._router_frame(sums.router[axis], place))
                parts["expert_rank"].append(self._rank_frame(sums, axis, place))
        frames = {name: pl.concat(rows) for name, rows in parts.items() if rows}
        return {**frames, **self._pair_frames(), "expert_part": self._part_frame()}

    def _empty(self) -> _Sums:
        layers, experts = len(self.layers), self.layers[0].num_experts
        return _Sums(
            np.zeros((layers, experts, len(_LOAD))),
            np.zeros((layers, experts, self.top_k), np.int64),
            np.zeros((layers, experts, self.top_k)),
            np.zeros((layers, 3)),
        )

    def _pairs_of(self, phase: str) -> NDArray[np.int64]:
        experts = self.layers[0].num_experts
        width = experts if experts <= MAX_PAIR_EXPERTS else 0
        return self._pairs.setdefault(phase, np.zeros((len(self.layers), width, width), np.int64))

    def _add_group(
        self,
        sums: _Sums,
        pairs: NDArray[np.int64],
        ids: NDArray[np.int16],
        weights: NDArray[np.float32],
        first: NDArray[np.bool_],
        part: NDArray[np.int64],
    ) -> None:
        parts = self._parts

        def one(axis: int) -> None:
            _add_layer(
                ids[axis], weights[axis], first, part,
                sums.load[axis], sums.rank_tokens[axis], sums.rank_gates[axis], sums.router[axis], pairs[axis],
                parts[axis],
            )  # fmt: skip

        with ThreadPoolExecutor(available_cores()) as threads:
            list(threads.map(one, range(len(ids))))

    def _load_frame(self, values: NDArray[np.float64], place: dict[str, Any]) -> pl.DataFrame:
        columns: dict[str, Any] = {name: values[:, index] for index, name in enumerate(_LOAD)}
        frame = pl.DataFrame({"expert": range(len(values)), **columns})
        if not self.has_weights:
            frame = frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in _LOAD[3:])
        counts = [pl.col(name).cast(pl.Int64) for name in _LOAD[:3]]
        return frame.with_columns(*counts, **_literals(place), kind=pl.lit("routed"))

    def _router_frame(self, values: NDArray[np.float64], place: dict[str, Any]) -> pl.DataFrame:
        row = {
            **place,
            "tokens": int(values[_ROUTED]),
            "selections": int(values[_SELECTIONS]),
            "logit_tokens": 0,
            "nonfinite_tokens": 0,
            "weight_entropy_sum": float(values[_ENTROPY]) if self.has_weights else None,
        }
        return pl.DataFrame([row], schema_overrides={"weight_entropy_sum": pl.Float64})

    def _rank_frame(self, sums: _Sums, axis: int, place: dict[str, Any]) -> pl.DataFrame:
        tokens = sums.rank_tokens[axis]
        frame = pl.DataFrame({"expert": range(len(tokens)), "tokens": list(tokens)})
        gates = pl.Series("gate_sum", list(sums.rank_gates[axis]) if self.has_weights else [None] * len(tokens))
        return frame.with_columns(gates.cast(pl.List(pl.Float64)), **_literals(place)).cast(
            {"tokens": pl.List(pl.Int64)}
        )

    def _pair_frames(self) -> dict[str, pl.DataFrame]:
        rows = [
            {
                "layer": layer.layer,
                "step": layer.step,
                "expert": expert,
                "domain": "",
                "phase": phase,
                "selections": row,
            }
            for phase, pairs in self._pairs.items()
            for layer, counts in zip(self.layers, pairs, strict=True)
            for expert, row in enumerate(counts.tolist())
        ]
        if not rows:
            return {}
        return {"expert_pair": pl.DataFrame(rows)}

    def _part_frame(self) -> pl.DataFrame:
        rows = []
        for layer, sums in zip(self.layers, self._parts, strict=True):
            for expert, (tokens, gates) in enumerate(zip(sums[..., 0], sums[..., 1], strict=True)):
                rows.append(
                    {
                        "layer": layer.layer, "step": layer.step, "expert": expert, "kind": "routed",
                        "tokens": tokens.astype(np.int64).tolist(),
                        "gate_sum": gates.tolist() if self.has_weights else None,
                    }
                )  # fmt: skip
        return pl.DataFrame(rows, schema_overrides={"gate_sum": pl.List(pl.Float64)})


@dataclass
class CountStatistics:
    """Adds up counts per expert over spans of time; :meth:`frames` gives the tables.

    Args:
        layers: of the recording; their ``top_k`` says how many tokens the selections stand for.
        phase: that the counts are filed under.
    """

    layers: Sequence[store.LayerInfo]
    phase: str
    _load: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    _spans: list[tuple[int, NDArray[np.int64]]] = field(default_factory=list)

    def add(self, *, counts: NDArray[np.int64], spans: NDArray[np.int64], domain: str) -> None:
        """Add counts (spans, layers, experts)."""
        total = self._load.setdefault(domain, np.zeros(counts.shape[1:], np.int64))
        total += counts.sum(axis=0)
        self._spans += [(int(span), part) for span, part in zip(spans, counts, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens that the selections stand for: the largest over layers."""
        summed = sum(load.sum(axis=1) for load in self._load.values())
        return int(
            max((count // max(layer.top_k, 1) for count, layer in zip(summed, self.layers, strict=True)), default=0)
        )

    def frames(self) -> dict[str, pl.DataFrame]:
        """Tables expert_load, router_load and, where there are several spans, load_span."""
        load: list[dict[str, Any]] = []
        router: list[dict[str, Any]] = []
        for domain, counts in self._load.items():
            for layer, row in zip(self.layers, counts, strict=True):
                place = {"layer": layer.layer, "step": layer.step, "domain": domain, "phase": self.phase}
                load += [
                    {**place, "expert": expert, "kind": "routed", "tokens": count}
                    for expert, count in enumerate(row.tolist())
                ]
                total = int(row.sum())
                router.append({**place, "tokens": total // max(layer.top_k, 1), "selections": total, "logit_tokens": 0})
        frames = {"expert_load": pl.DataFrame(load), "router_load": pl.DataFrame(router)}
        if len(self._spans) > 1:
            frames["load_span"] = pl.DataFrame(
                [
                    {"layer": layer.layer, "step": layer.step, "span": span, "tokens": part[axis].tolist()}
                    for span, part in self._spans
                    for axis, layer in enumerate(self.layers)
                ]
            )
        return frames


def _literals(place: dict[str, Any]) -> dict[str, pl.Expr]:
    return {name: pl.lit(value) for name, value in place.items()}


@numba.njit(nogil=True, cache=True)
def _add_layer(
    ids: Any, weights: Any, first: Any, part: Any, load: Any, rank_tokens: Any, rank_gates: Any, router: Any,
    pairs: Any, parts: Any,
) -> None:  # fmt: skip
    """Add the tokens of one layer; ids, weights (tokens, k), first, part (tokens,), the rest as in ``_Sums``."""
    tokens, k = ids.shape
    paired = len(pairs) > 0
    for token in range(tokens):
        total = 0.0
        used = 0
        for rank in range(k):
            if ids[token, rank] >= 0:
                total += weights[token, rank]
                used += 1
        if used == 0:
            continue
        entropy = 0.0
        for rank in range(k):
            expert = ids[token, rank]
            if expert < 0:
                continue
            weight = np.float64(weights[token, rank])
            share = weight / total if total > 0 else 0.0
            if share > 0:
                entropy -= share * np.log(share)
            row = load[expert]
            row[0] += 1
            if rank == 0:
                row[1] += 1
            if first[token]:
                row[2] += 1
            row[3] += weight
            row[4] += weight * weight
            row[5] += share
            rank_tokens[expert, rank] += 1
            rank_gates[expert, rank] += weight
            parts[expert, part[token], 0] += 1
            parts[expert, part[token], 1] += weight
            if paired:
                for other in range(k):
                    if ids[token, other] >= 0:
                        pairs[expert, ids[token, other]] += 1
        router[0] += entropy
        router[1] += used
        router[2] += 1
