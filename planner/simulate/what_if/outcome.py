"""What a rule makes of a trace: the one result that every method gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moescope.errors import InputError
from profiler.metrics._arrays import FloatArray, IntArray, ratio

Certainty = Literal["exact", "proxy", "needs a live run"]
"""``exact``: what the rule does to the choice in each layer, on the inputs that it had. ``proxy``: nearly that, for the
reason that is given. ``needs a live run``: most of the tokens cannot be answered from what the run stores."""

Weights = Literal["renormalized", "kept"]
"""What becomes of the gate weights of the experts that stay: scaled up to the sum of all before, or as they were."""


class Refused(InputError):
    """A rule that makes no sense on this run, or for which the run lacks the data."""


@dataclass(frozen=True)
class WhatIf:
    """One method at several values, per layer. V values, L layers, E experts of the widest layer.

    Counts are of tokens that used an expert in the layer. ``before`` is what the rule starts from: the recorded choice,
    or, for methods that choose from router scores, the largest logits, as many as the token used.

    Attributes:
        method: its name.
        values: (V,) the values as they were asked for.
        layer_values: (V, L) the value that each layer was given; other than ``values`` where it was fitted.
        layers: (layer, step) of each entry of axis 1.
        num_experts: (L,) E of each layer.
        tokens: (L,) tokens that the result rests on.
        run_tokens: tokens of the part of the run that was asked about, whether the result rests on them or not.
        counts: (V, L, most + 1) tokens by number of active experts.
        counts_before: (L, most + 1) the same of what the rule starts from.
        load: (V, L, E) tokens of each expert.
        load_before: (L, E) the same before.
        kept_mass: (V, L) mean share of ``mass_of`` on the active experts.
        kept_mass_before: (L,) the same before; 1 where ``mass_of`` is the token's own gate weights.
        mass_of: what the mass is a share of.
        flops: (V, L) multiply-add operations, counted as 2 each, of the active experts per token: 6 x hidden size x
            width for each that has weights, 4 x without a gate projection; NaN where a size is unknown.
        flops_before: (L,) the same before.
        changed_tokens: (V, L) share of tokens whose set of experts is another.
        dropped: (V, L) share of the selections before that are no longer made.
        added: (V, L) selections that are new, per selection before.
        known: (V, L) share of tokens for which the stored data prove the answer; the others count as far as they do.
        rounding: (V, L) share of tokens whose answer the 8 bits of stored gate weights may have changed; 0 where no
            gate weight decides.
        own_choice: (L,) share of tokens whose recorded choice is that of the largest stored logits; NaN where the
            method reads no scores.
        softmax_gate: (L,) share of tokens whose two largest gate weights have the ratio of a softmax of their logits,
            of those of which it can be told; NaN where the method reads no scores, or none can.
        changed_others: (V, L) share of the tokens with another set whose recorded choice was not that of the largest
            logits to begin with; 0 where none changes, NaN where the method reads no scores.
        figures: (V, L) further figures of the method by name.
        certainties: per value.
        why: one sentence on the certainty.
        convention: one sentence on what becomes of the gate weights.
        notes: sentences that belong beside the figures.
    """

    method: str
    values: FloatArray
    layer_values: FloatArray
    layers: list[tuple[int, int]]
    num_experts: IntArray
    tokens: IntArray
    run_tokens: int
    counts: IntArray
    counts_before: IntArray
    load: IntArray
    load_before: IntArray
    kept_mass: FloatArray
    kept_mass_before: FloatArray
    mass_of: str
    flops: FloatArray
    flops_before: FloatArray
    changed_tokens: FloatArray
    dropped: FloatArray
    added: FloatArray
    known: FloatArray
    rounding: FloatArray
    own_choice: FloatArray
    softmax_gate: FloatArray
    changed_others: FloatArray
    certainties: tuple[Certainty, ...]
    why: str
    convention: str
    notes: tuple[str, ...] = ()
    figures: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def certainty(self) -> Certainty:
        """Of all values: that of the least certain one."""
        order: tuple[Certainty, ...] = ("needs a live run", "proxy", "exact")
        return next(one for one in order if one in self.certainties)

    @property
    def mean_active(self) -> FloatArray:
        """(V, L) mean active experts per token."""
        return _mean(self.counts)

    @property
    def mean_active_before(self) -> FloatArray:
        """(L,) mean active experts per token before."""
        return _mean(self.counts_before)

    @property
    def p50_active(self) -> FloatArray:
        """(V, L) median of the active experts per token."""
        return quantile(self.counts, 0.5)

    @property
    def p95_active(self) -> FloatArray:
        """(V, L) active experts that 95 % of the tokens do not exceed."""
        return quantile(self.counts, 0.95)

    @property
    def flops_share(self) -> FloatArray:
        """(V, L) operations of the experts as a share of those before."""
        return ratio(self.flops, self.flops_before)

    @property
    def changed_selections(self) -> FloatArray:
        """(V, L) selections dropped and added, per selection before."""
        return self.dropped + self.added

    @property
    def load_cv(self) -> FloatArray:
        """(V, L) coefficient of variation of the load over the experts of the layer."""
        return variation(self.load, self.num_experts)

    @property
    def load_cv_before(self) -> FloatArray:
        """(L,) the same before."""
        return variation(self.load_before, self.num_experts)

    @property
    def load_peak(self) -> FloatArray:
        """(V, L) load of the busiest expert over the mean load."""
        return peak(self.load, self.num_experts)

    @property
    def load_peak_before(self) -> FloatArray:
        """(L,) the same before."""
        return peak(self.load_before, self.num_experts)

    def pooled(self, name: str) -> FloatArray:
        """(V,) one of the (V, L) figures, by attribute or name in ``figures``: mean over layers, weighted by tokens."""
        values = self.figures[name] if name in self.figures else getattr(self, name)
        known = np.isfinite(values) & (self.tokens > 0)
        weight = np.where(known, self.tokens, 0)
        return ratio((np.where(known, values, 0.0) * weight).sum(1), weight.sum(1))

    def pooled_quantile(self, share: float) -> FloatArray:
        """(V,) active experts that so large a share of all token-layers does not exceed."""
        return quantile(self.counts.sum(1), share)


def quantile(counts: NDArray[np.int64], share: float) -> FloatArray:
    """Smallest number that at least ``share`` of the counted do not exceed; the last axis runs over numbers from 0."""
    reached = np.cumsum(counts, axis=-1)
    total = reached[..., -1:]
    found = np.argmax(reached >= np.maximum(np.ceil(share * total - 1e-9), 1), axis=-1).astype(np.float64)
    return np.where(total[..., 0] > 0, found, np.nan)


def variation(load: NDArray[np.int64], experts: IntArray) -> FloatArray:
    """Coefficient of variation over the first ``experts`` of the last axis; axis -2 runs over layers."""
    first = np.arange(load.shape[-1]) < experts[:, None]
    mean = ratio(load.sum(-1), experts)
    square = np.where(first, (load - mean[..., None]) ** 2, 0.0).sum(-1)
    return ratio(np.sqrt(ratio(square, experts)), mean)


def peak(load: NDArray[np.int64], experts: IntArray) -> FloatArray:
    """Largest over mean, over the first ``experts`` of the last axis."""
    return ratio(load.max(-1) * experts, load.sum(-1))


def _mean(counts: NDArray[np.int64]) -> FloatArray:
    return ratio((counts * np.arange(counts.shape[-1])).sum(-1), counts.sum(-1))
