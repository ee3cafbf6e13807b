"""Biases that even out the load of a layer's experts, found on a recorded trace by the sign updates of
auxiliary-loss-free balancing (arXiv 2408.15664), and judged on sequences that they were not fitted on.

The paper moves a bias during training, batch by batch, and adds it to scores that only choose. Here the model is fixed,
the whole of one half of the text is the batch, the step shrinks, and the bias is added to the logits, so that gate
weights move with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import store
from compressor.plan import LayerKey
from moescope.errors import PlanError
from planner.route.shift import Ids, Logits, load, variation

ROUNDS = 120
"""Sign updates. The step halves about every fourteen of them."""

_DECAY = 0.952
FITTED_TOKENS = 16_384
"""Tokens of either half that are read, nearly; spread over the text where there are more."""

_AGREES = 0.95
"""Part of the tokens whose recorded choice must be that of their largest stored logits; less than all, since logits in
16 bits tie."""


@dataclass(frozen=True)
class Balanced:
    """Biases of one layer, and what they do to text that they were not fitted on.

    Attributes:
        key: (layer, step).
        bias: (E,) added to the logits; its mean is 0.
        before: coefficient of variation of the load as it is, on the text that judges.
        after: the same with the bias.
        fitted: with the bias, on the text that it was fitted on.
        tokens: that judge.
    """

    key: LayerKey
    bias: NDArray[np.float64]
    before: float
    after: float
    fitted: float
    tokens: int


def balanced(run: store.Run, layer: store.LayerInfo, *, rounds: int = ROUNDS) -> Balanced:
    """Biases that even out one layer's load.

    Every other sequence of each domain fits, the others judge.

    Args:
        run: a run with router scores.
        layer: one of its layers.
        rounds: sign updates.

    Raises:
        PlanError: no router scores, fewer than two sequences, or a router that does not choose its largest logits.
    """
    if not run.has_scores:
        raise PlanError(f"run {run.name!r} holds no router scores: collect it again with --router-scores")
    fitting, judging = halves(run)
    if not fitting or not judging:
        raise PlanError(
            f"run {run.name!r} has router scores of {len(fitting)} sequence: one to fit on and one to judge are needed"
        )
    first, second = (_read(run, layer, part) for part in (fitting, judging))
    bias, fitted = fit(*first, experts=layer.num_experts, top_k=layer.top_k, rounds=rounds)
    before, after = (
        variation(load(*second, shift, top_k=layer.top_k)) for shift in (np.zeros_like(bias), bias)
    )  # fmt: skip
    return Balanced((layer.layer, layer.step), bias, before, after, fitted, len(second[0]))


def fit(
    ids: Ids, logits: Logits, *, experts: int, top_k: int, rounds: int = ROUNDS
) -> tuple[NDArray[np.float64], float]:
    """(E,) biases with mean 0, and the coefficient of variation of the load that they give on these tokens.

    Each round adds a step to the experts below the mean load and takes one from those above; the best of all rounds
    counts, the first being no bias at all.

    Args:
        ids: (tokens, m) experts with the largest logits, -1 = none.
        logits: (tokens, m) theirs; NaN = none.
    """
    bias = np.zeros(experts)
    counted = load(ids, logits, bias, top_k=top_k)
    best, least = bias, variation(counted)
    step = float(np.nanstd(logits)) / 4 or 1.0
    for _ in range(rounds):
        bias = bias + step * np.sign(counted.mean() - counted)
        bias -= bias.mean()
        counted = load(ids, logits, bias, top_k=top_k)
        found = variation(counted)
        if found < least:
            best, least = bias, found
        step *= _DECAY
    return best, least


def halves(run: store.Run) -> tuple[list[int], list[int]]:
    """Every other sequence with router scores of each domain, and the others, evenly spread where they are many."""
    every = max(1, -(-int(run.scored_sequences["tokens"].sum()) // (2 * FITTED_TOKENS)))
    parts: tuple[list[int], list[int]] = ([], [])
    for _, part in run.scored_sequences.group_by("domain", maintain_order=True):
        kept = part["sequence"].gather_every(every).to_list()
        parts[0].extend(kept[::2])
        parts[1].extend(kept[1::2])
    return sorted(parts[0]), sorted(parts[1])


def _read(run: store.Run, layer: store.LayerInfo, sequences: list[int]) -> tuple[Ids, Logits]:
    """(tokens, m) ids and logits of a layer.

    Raises:
        PlanError: its router does not choose its largest logits, or shows none.
    """
    scores = run.layer_scores(layer=layer.layer, step=layer.step, sequences=sequences)
    chosen = run.layer_selections(layer=layer.layer, step=layer.step, sequences=scores.sequences.tolist())
    if len(scores.ids) != len(chosen.ids) or not len(scores.ids):
        raise PlanError(f"layer {layer.layer} of run {run.name!r} has no router scores: its router shows none")
    largest = scores.ids[:, : layer.top_k]
    full = (chosen.ids >= 0).all(-1) & (largest >= 0).all(-1)
    same = (np.sort(chosen.ids, -1)[full] == np.sort(largest, -1)[full]).all(-1)
    if not len(same) or same.mean() < _AGREES:
        raise PlanError(
            f"layer {layer.layer} chooses other experts than those of its largest logits for {int((~same).sum()):,} of"
            f" {len(same):,} tokens: it adds something before it chooses, and what a bias does there is not known"
        )
    known = scores.ids[:, 0] >= 0
    return scores.ids[known], scores.logits[known].astype(np.float64)
