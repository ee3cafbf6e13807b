"""Specialization: how far experts are for one domain, or for single tokens of the vocabulary.

Two published forms of each. OLMoE (arXiv 2409.02060, section 5) counts all k experts of a token: the share of a
domain's tokens, or of a token id's occurrences, that go to an expert. The paper on local routing (arXiv 2505.16056) has
one figure per expert, so that it can be held against its SRP: the spread over domains, and the mean share of the token
ids whose first choice it mostly is.

An id that occurs once goes to one expert always, so vocabulary specialization is large on any short text: read it
beside the same text with its token ids shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import FloatArray, Ids, IntArray, ratio

FIRST_CHOICE_OCCURRENCES = 20
"""Occurrences that a token id needs to count for its expert, in the paper on local routing."""


def domain_shares(*, counts: ArrayLike, tokens: ArrayLike) -> FloatArray:
    """Share of each domain's tokens that use each expert, (..., domains, experts): 0..1, k / E without specialization.

    counts (..., domains, experts): selections; tokens (..., domains). NaN for a domain without tokens.
    """
    return ratio(counts, np.asarray(tokens)[..., None])


def domain_specialization(*, shares: ArrayLike) -> FloatArray:
    """The largest share of any expert, averaged over domains, (...): k / E to 1. shares (..., domains, experts)."""
    largest: FloatArray = np.asarray(shares, np.float64).max(axis=-1).mean(axis=-1)
    return largest


def domain_variation(*, shares: ArrayLike, least: float = 0.0) -> FloatArray:
    """Standard deviation over mean of an expert's shares over domains, (..., experts): 0..sqrt(domains).

    The sample standard deviation (ddof 1) of arXiv 2505.16056, in which every domain counts alike. NaN for an expert
    that is never used, or below two domains. shares (..., domains, experts).

    least: leave out the domains in which the expert's share is at most this. The published code does, with 1e-5, and
    so understates the experts that serve a single domain; 0, the default, keeps every domain.
    """
    values = np.asarray(shares, np.float64)
    kept = values > least if least > 0 else np.isfinite(values)
    count = kept.sum(axis=-2)
    mean = ratio(np.where(kept, values, 0.0).sum(axis=-2), count)
    squares = np.where(kept, (values - mean[..., None, :]) ** 2, 0.0).sum(axis=-2)
    return ratio(np.sqrt(ratio(squares, count - 1)), mean)


@dataclass(frozen=True)
class TokenIndex:
    """The tokens of a text in the order of their ids.

    Attributes:
        token_ids: (ids,) those that occur, ascending.
        order: (kept tokens,) tokens by id, earlier ones first.
        bounds: (ids + 1,) where each id begins in ``order``.
    """

    token_ids: IntArray
    order: IntArray
    bounds: IntArray

    @classmethod
    def of(cls, token_ids: NDArray[Any], *, kept: NDArray[np.bool_] | None = None) -> TokenIndex:
        """Index token_ids (tokens,); negative ones (no token) and those not ``kept`` are left out."""
        chosen = np.flatnonzero(token_ids >= 0 if kept is None else (token_ids >= 0) & kept)
        order = chosen[np.argsort(token_ids[chosen], kind="stable")]
        found, first = np.unique(token_ids[order], return_index=True)
        return cls(found.astype(np.int64), order, np.append(first, len(order)).astype(np.int64))

    @property
    def occurrences(self) -> IntArray:
        """(ids,) how often each id occurs."""
        return np.diff(self.bounds)


@dataclass(frozen=True)
class VocabularyCounts:
    """Which expert takes most of each token id, in one layer; all (ids,).

    token_ids; occurrences: tokens of the id; largest: how many of them went to ``expert``, which is -1 where no expert
    took any.
    """

    token_ids: IntArray
    occurrences: IntArray
    largest: IntArray
    expert: IntArray

    @property
    def share(self) -> FloatArray:
        """(ids,) the expert's share of the id's occurrences."""
        return ratio(self.largest, self.occurrences)


def vocabulary_counts(*, ids: Ids, index: TokenIndex, num_experts: int) -> VocabularyCounts:
    """Count the experts of every token id in one layer.

    ids (tokens, k), -1 = none: give the first column alone to count first choices. Ties go to the smaller expert.

    Raises:
        MetricError: the index is of more tokens than ``ids`` has, or an id is no expert.
    """
    from ._vocabulary import largest_counts

    if len(index.order) and int(index.order.max()) >= len(ids):
        raise MetricError(f"the token ids are of {int(index.order.max()) + 1} tokens or more, selections of {len(ids)}")
    if ids.size and int(ids.max()) >= num_experts:
        raise MetricError(
            f"selections hold id {int(ids.max())}; with {num_experts} experts ids end at {num_experts - 1}"
        )
    largest = np.zeros(len(index.token_ids), np.int64)
    expert = np.full(len(index.token_ids), -1, np.int64)
    largest_counts(np.ascontiguousarray(ids), index.order, index.bounds, num_experts, largest, expert)
    return VocabularyCounts(index.token_ids, index.occurrences, largest, expert)


def vocabulary_specialization(*, counts: VocabularyCounts, min_occurrences: int = 1) -> float:
    """The largest share that any expert has of a token id's occurrences, averaged over ids: k / E to 1.

    OLMoE's: every id counts alike, and an id that occurs once counts 1. NaN where no id occurs often enough.
    """
    kept = counts.occurrences >= min_occurrences
    return float(counts.share[kept].mean()) if kept.any() else float("nan")


def first_choice_vocabulary(
    *, counts: VocabularyCounts, num_experts: int, min_occurrences: int = FIRST_CHOICE_OCCURRENCES
) -> FloatArray:
    """Mean share of the token ids that are an expert's own, (experts,): 1 / E to 1; NaN for an expert without any.

    counts: of first choices. An id is the expert's that is first choice for most of its occurrences; rarer ids than
    ``min_occurrences`` are left out. The form of arXiv 2505.16056.
    """
    kept = (counts.occurrences >= min_occurrences) & (counts.expert >= 0)
    owner = counts.expert[kept]
    sums = np.bincount(owner, weights=counts.share[kept], minlength=num_experts)
    return ratio(sums, np.bincount(owner, minlength=num_experts))


def correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Pearson's correlation over the entries that both have; NaN below three of them, or where one does not vary."""
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    both = np.isfinite(one) & np.isfinite(other)
    one, other = one[both], other[both]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])
