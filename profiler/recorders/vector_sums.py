"""What recorders of vectors share: sums of (experts, width) matrices, on the device, apart by kind and phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import ExpertRows, LayerKey
from profiler.recorders.base import double_lists, float_lists, vector_domain
from profiler.recorders.staged import Staged

VectorKey = tuple[LayerKey, str, str, str]
"""((layer, step), kind, domain, phase); the domain is empty where vectors are pooled."""


@dataclass(frozen=True)
class DomainRows:
    """The rows of one domain among the rows inside the experts, still sorted by expert; ``chosen`` None = all."""

    key: VectorKey
    chosen: Tensor | None
    gate: Tensor
    expert: Tensor
    token: Tensor
    counts: Tensor


def split_domains(batch: ExpertRows, *, by_domain: bool) -> Iterator[DomainRows]:
    """The rows of each domain, or all of them as one where vectors are pooled."""
    names: dict[str, list[int]] = {}
    for entry in batch.tokens.present:
        names.setdefault(vector_domain(batch.tokens.groups, entry, by_domain=by_domain), []).append(entry)
    for domain, entries in names.items():
        key = (batch.key, batch.kind, domain, batch.phase)
        if len(names) == 1:
            yield DomainRows(key, None, batch.gate, batch.expert, batch.token, batch.counts)
            continue
        chosen = torch.isin(batch.group(), torch.tensor(entries, device=batch.token.device)).nonzero()[:, 0]
        expert = batch.expert[chosen]
        counts = torch.bincount(expert, minlength=batch.num_experts)
        yield DomainRows(key, chosen, batch.gate[chosen], expert, batch.token[chosen], counts)


@dataclass
class _State:
    tokens: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


class VectorSums(Staged):
    """Sums and maxima of (experts, width) values in float64 on the data's device; drained as lists of 64 and 32 bits.

    Args:
        by_domain: keep domains apart.
    """

    table = ""

    def __init__(self, by_domain: bool = False) -> None:
        super().__init__()
        self._by_domain = by_domain
        self._states: dict[VectorKey, _State] = {}

    def add(
        self, key: VectorKey, counts: Tensor, sums: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add (experts, width) values at the end of the forward; ``counts`` (experts,) are the rows behind them."""

        def take() -> None:
            state = self._states.get(key)
            if state is None:
                doubled = {name: values.double() for name, values in sums.items()}
                self._states[key] = _State(counts.clone(), doubled, dict(maxima or {}))
                return
            # Not in place: the first batch may have run under inference_mode and this one not.
            state.tokens = state.tokens + counts
            state.sums = {name: values + sums[name] for name, values in state.sums.items()}
            state.maxima = {name: torch.maximum(old, (maxima or {})[name]) for name, old in state.maxima.items()}

        self.later(take)

    def drain(self) -> dict[str, pl.DataFrame]:
        """The table, one row per expert that saw a token."""
        states, self._states = self._states, {}
        frames = []
        for ((layer, step), kind, domain, phase), state in states.items():
            used = state.tokens.nonzero()[:, 0]
            columns = {name: double_lists(values[used]) for name, values in state.sums.items()}
            columns |= {name: float_lists(values[used]) for name, values in state.maxima.items()}
            frame = pl.DataFrame({"expert": used.cpu().numpy(), "tokens": state.tokens[used].cpu().numpy(), **columns})
            named = {"kind": pl.lit(kind), "domain": pl.lit(domain), "phase": pl.lit(phase)}
            frames.append(frame.with_columns(layer=pl.lit(layer), step=pl.lit(step), **named))
        return {self.table: pl.concat(frames, how="diagonal_relaxed")} if frames else {}
