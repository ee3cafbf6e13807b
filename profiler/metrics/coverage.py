"""Whether the text is enough: tokens per expert, errors of scores, and how far parts of the text rank experts alike.

Two texts of the same kind rank experts differently, because each is a sample. A run tells how much without a second
text: its sums are kept for 16 parts of its sequences (table ``expert_part``), and halves made of 8 parts each are two
independent texts of half the length. Spearman-Brown (Spearman 1910, Brown 1910) carries the agreement of halves to the
whole and beyond: text n times as long agrees n r / (1 + (n - 1) r) where it agrees r now. That assumes that the score
of a text is a true value plus noise that is independent between texts and shrinks like 1 / length: so for more text of
the same kind, and roughly, for ranks are not values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moescope.errors import MetricError

from ._arrays import BoolArray, FloatArray, IntArray, ratio
from .agreement import SHARES, kendall, overlap, spearman

STARVED = 0.1
"""Starved: used by less than this part of the tokens that a balanced router would send."""

ERROR = 0.1
"""Relative standard error of an expert's mean that we ask for."""

TARGET = 0.95
"""Agreement of two texts of the run's length that we ask for (Spearman)."""

RULE_OF_THREE = 3.0
"""What never happened in N tries happens, with 95 % confidence, less often than 3 in N (Hanley 1983)."""

SCORES: dict[str, tuple[str, str | None]] = {
    "frequency": ("tokens", None),
    "gate_mass": ("gate_sum", None),
    "mean_gate": ("gate_sum", "tokens"),
    "ean": ("norm_sum", None),
    "man": ("norm_sum", "tokens"),
    "reap": ("gated_norm_sum", "tokens"),
}
"""Scores that the parts hold: what is summed, and what it is divided by. Names as in ``planner.importance``."""


@dataclass(frozen=True)
class Reach:
    """How far the text reaches each expert of a layer.

    balanced: tokens per expert of a balanced router, k N / E. threshold: ``starved`` times that. starved, unused:
    (experts,) bool. needed: (experts,) tokens of such text that would give the expert ``threshold`` tokens (of those
    that got none: at least that many, with 95 % confidence).
    """

    balanced: float
    threshold: float
    starved: BoolArray
    unused: BoolArray
    needed: FloatArray


@dataclass(frozen=True)
class PartAgreement:
    """Agreement of pairs of texts, one per draw: spearman, kendall (draws,), overlap (draws, shares)."""

    spearman: FloatArray
    kendall: FloatArray
    overlap: FloatArray


def reach(*, counts: ArrayLike, top_k: float, tokens: float, starved: float = STARVED) -> Reach:
    """Tokens per expert against the requirement ``starved`` x k x N / E.

    The requirement is a share of the text, so more of the same text does not lift an expert over it; what more text
    gives is tokens, and ``needed`` says how many until the expert has as many as the threshold asks for today.

    counts (experts,): selections of one layer. tokens: N.

    Raises:
        MetricError: counts that are no such array, or top_k outside 1..E.
    """
    used = np.asarray(counts, dtype=np.float64)
    if used.ndim != 1 or not len(used) or (used < 0).any():
        raise MetricError(f"counts have shape {used.shape}; they are the selections of the experts of one layer")
    if not 0 < top_k <= len(used):
        raise MetricError(f"top_k is {top_k} with {len(used)} experts; it lies above 0 and at most num_experts")
    balanced = top_k * tokens / len(used)
    threshold = starved * balanced
    needed = tokens_for(counts=used, tokens=tokens, wanted=threshold)
    return Reach(balanced, threshold, used < threshold, used == 0, needed)


def tokens_for(*, counts: ArrayLike, tokens: float, wanted: ArrayLike) -> FloatArray:
    """Tokens of text after which each expert has ``wanted`` ones, at its present rate; at least the present N.

    An expert without tokens has a rate below 3 / N (rule of three): it takes at least wanted x N / 3, and maybe no
    text of this kind is enough.
    """
    used = np.asarray(counts, dtype=np.float64)
    rate = np.where(used > 0, used, RULE_OF_THREE)
    return np.maximum(tokens * np.asarray(wanted, dtype=np.float64) / rate, tokens)


def tokens_for_error(*, error: float = ERROR, variation: ArrayLike = 1.0) -> FloatArray:
    """Tokens that an expert needs for a relative standard error of its mean: (variation / error) squared.

    variation: standard deviation over mean of what is averaged, token by token; 1 unless it was measured.
    """
    return np.asarray((np.asarray(variation, dtype=np.float64) / error) ** 2, dtype=np.float64)


def token_error(*, counts: ArrayLike, sums: ArrayLike, square_sums: ArrayLike) -> FloatArray:
    """Relative standard error of each expert's mean, as if its tokens were independent: s / (mean sqrt(n)).

    Tokens of one text resemble each other, so this is a lower bound. NaN below two tokens or where the mean is 0.
    counts, sums, square_sums (experts,): n, sum and sum of squares.
    """
    n, total, squares = (np.asarray(values, dtype=np.float64) for values in (counts, sums, square_sums))
    mean = ratio(total, n)
    variance = np.maximum(ratio(squares, n) - mean**2, 0.0) * ratio(n, n - 1)
    return ratio(np.sqrt(variance), np.abs(mean) * np.sqrt(n))


def part_error(*, sums: ArrayLike, counts: ArrayLike | None = None) -> FloatArray:
    """Relative standard error of each expert's score from how it varies between parts: no independence of tokens asked.

    sums (experts, parts); counts (experts, parts) for a mean, sums / counts; None for a sum. A mean is a ratio of sums,
    whose error to first order is that of sums - mean x counts. NaN below two parts, or for a score of 0.
    """
    values = np.asarray(sums, dtype=np.float64)
    parts = values.shape[1]
    if parts < 2:
        return np.full(len(values), np.nan)
    if counts is None:
        rest = values - values.mean(axis=1, keepdims=True)
    else:
        used = np.asarray(counts, dtype=np.float64)
        rest = values - ratio(values.sum(axis=1), used.sum(axis=1), empty=0.0)[:, None] * used
    spread = np.sqrt(parts / (parts - 1) * (rest**2).sum(axis=1))
    return ratio(spread, np.abs(values.sum(axis=1)))


def score(*, parts: Mapping[str, NDArray[np.generic]], name: str, chosen: ArrayLike | None = None) -> FloatArray:
    """A score of every expert from the sums of some parts; 0 for an expert without tokens, as everywhere.

    parts: (experts, parts) sums by column of ``expert_part``. chosen: (draws, parts) bool, whose parts each draw adds
    up; None = all. Returns (draws, experts), or (experts,) without ``chosen``.

    Raises:
        MetricError: no such score, or its sums are missing.
    """
    if name not in SCORES:
        raise MetricError(f"no score {name!r} in parts of the text; there are {', '.join(SCORES)}")
    above, below = SCORES[name]
    missing = [column for column in (above, below) if column is not None and column not in parts]
    if missing:
        raise MetricError(f"score {name!r} takes {missing[0]}; the parts hold {', '.join(parts)}")
    first = next(iter(parts.values()))
    weights = np.ones(first.shape[1]) if chosen is None else np.asarray(chosen, dtype=np.float64)
    total = weights @ parts[above].T.astype(np.float64)
    return total if below is None else ratio(total, weights @ parts[below].T.astype(np.float64), empty=0.0)


def available(parts: Mapping[str, object]) -> list[str]:
    """The scores whose sums the parts hold."""
    return [name for name, (above, below) in SCORES.items() if above in parts and (below is None or below in parts)]


def draw_pairs(*, num_parts: int, size: int, other: int, num_draws: int, seed: int = 0) -> tuple[BoolArray, BoolArray]:
    """Random pairs of disjoint texts, of ``size`` and of ``other`` parts: two (draws, parts) bool.

    Raises:
        MetricError: a text without parts, or more parts than there are.
    """
    if size < 1 or other < 1 or size + other > num_parts:
        raise MetricError(f"texts of {size} and {other} parts cannot be drawn from {num_parts}: both take at least 1")
    generator = np.random.default_rng((seed, size, other))
    place = generator.permuted(np.tile(np.arange(num_parts), (num_draws, 1)), axis=1)
    return place < size, (place >= size) & (place < size + other)


def part_agreement(
    *,
    parts: Mapping[str, NDArray[np.generic]],
    name: str,
    first: ArrayLike,
    second: ArrayLike,
    shares: Sequence[float] = SHARES,
    pairwise: bool = True,
) -> PartAgreement:
    """How alike a score ranks the experts of one layer in pairs of texts; first, second (draws, parts) bool.

    pairwise: count the pairs of experts for Kendall's tau too, which takes longest; else it is NaN.

    Raises:
        MetricError: as ``score``.
    """
    one, other = (score(parts=parts, name=name, chosen=chosen) for chosen in (first, second))
    return PartAgreement(
        spearman=spearman(first=one, second=other),
        kendall=kendall(first=one, second=other) if pairwise else np.full(len(one), np.nan),
        overlap=np.stack([overlap(first=one, second=other, share=share) for share in shares], axis=1),
    )


def lengthened(*, agreement: ArrayLike, factor: float) -> FloatArray:
    """Agreement of two texts ``factor`` times as long as those that agree so far (Spearman-Brown); 0 stays 0.

    Agreements below 0, which only noise gives, count as 0.
    """
    known = np.clip(np.asarray(agreement, dtype=np.float64), 0.0, 1.0)
    return np.asarray(factor * known / (1.0 + (factor - 1.0) * known), dtype=np.float64)


def length_for(*, agreement: ArrayLike, target: float = TARGET) -> FloatArray:
    """How many times as long texts must be to agree ``target``: target (1 - r) / (r (1 - target)); infinite for r <= 0.

    Below 1 where shorter texts are enough.

    Raises:
        MetricError: a target outside 0..1.
    """
    if not 0.0 < target < 1.0:
        raise MetricError(f"target is {target}; it lies between 0 and 1, usually 0.95")
    known = np.clip(np.asarray(agreement, dtype=np.float64), 0.0, 1.0)
    factor = ratio(target * (1.0 - known), known * (1.0 - target), empty=np.inf)
    return np.where(np.isnan(np.asarray(agreement, dtype=np.float64)), np.nan, factor)


def parts_of_counts(*, counts: IntArray, part: IntArray, num_parts: int) -> IntArray:
    """Selections per expert and part, (experts, parts), from selections per text (texts, experts) and its part."""
    result = np.zeros((num_parts, counts.shape[1]), dtype=np.int64)
    np.add.at(result, part, counts)
    return result.T
