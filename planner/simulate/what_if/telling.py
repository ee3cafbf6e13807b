"""From sums to a result, and the sentences that say how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from planner.simulate.what_if.blocks import Subject
from planner.simulate.what_if.outcome import Certainty, Weights, WhatIf
from planner.simulate.what_if.registry import Method
from planner.simulate.what_if.tally import Tally
from profiler.metrics._arrays import FloatArray, ratio

PROVEN = 0.999
"""Share of tokens from which on a result counts as proven, and a router as one that takes its largest logits."""

SOFTMAX = 0.95
"""Share of tokens from which on a gate counts as a softmax of the router's logits."""

ANSWERED = 0.5
"""Share of tokens below which only a live run can tell."""

_CONVENTION = {
    "renormalized": "The gate weights of the experts that stay are scaled up to the sum that all had before.",
    "kept": "The gate weights of the experts that stay are as they were, so that their sum shrinks.",
}


def assemble(
    subject: Subject,
    method: Method,
    tallies: Sequence[Tally],
    values: FloatArray,
    layer_values: FloatArray,
    *,
    weights: Weights,
    scored: bool,
    fitted: bool,
    notes: tuple[str, ...],
    tiers: tuple[float, tuple[float, float]],
) -> WhatIf:
    """The result from one tally per layer; arguments as in ``what_if``."""
    tokens = np.array([one.tokens for one in tallies], np.int64)
    selections = np.array([one.selections for one in tallies], np.int64)
    load, before = _stacked([one.load for one in tallies]), _stacked([one.load_before for one in tallies])
    costs = np.stack([_wide(layer.flops, load.shape[-1]) for layer in subject.layers])
    own = ratio([one.agreeing for one in tallies], tokens) if scored else np.full(len(tokens), np.nan)
    known = 1 - ratio(_per_value(tallies, "unknown"), tokens, empty=0.0)
    gated = np.array([one.gated for one in tallies], np.int64) * scored
    softmax = ratio([one.softmax for one in tallies], gated)
    other_gate = 1 - float(np.nansum(softmax * gated) / gated.sum()) if gated.any() else 0.0
    certainties = _certainties(method, known, own, tokens, scored, other_gate)
    return WhatIf(
        method=method.name,
        values=values,
        layer_values=layer_values,
        layers=[layer.key for layer in subject.layers],
        num_experts=np.array([layer.info.num_experts for layer in subject.layers], np.int64),
        tokens=tokens,
        run_tokens=subject.run_tokens,
        counts=_stacked([one.counts for one in tallies]).swapaxes(0, 1),
        counts_before=_stacked([one.counts_before for one in tallies]),
        load=load.swapaxes(0, 1),
        load_before=before,
        kept_mass=ratio(_per_value(tallies, "kept"), tokens),
        kept_mass_before=ratio([one.kept_before for one in tallies], tokens),
        mass_of="router probability" if _by_probability(method, scored) else "gate weight of the token's own choice",
        flops=ratio((load.swapaxes(0, 1) * costs).sum(-1), tokens),
        flops_before=ratio((before * costs).sum(-1), tokens),
        changed_tokens=1 - ratio(_per_value(tallies, "same"), tokens),
        dropped=1 - ratio(_per_value(tallies, "kept_own"), selections),
        added=ratio(_per_value(tallies, "added"), selections),
        known=known,
        rounding=ratio(_per_value(tallies, "doubts"), tokens),
        own_choice=own,
        certainties=certainties,
        softmax_gate=softmax,
        changed_others=_changed_others(tallies, tokens) if scored else np.full(known.shape, np.nan),
        why=_why(method, known, own, tokens, scored, other_gate, _pooled_others(tallies, tokens)),
        convention=_convention(method, weights),
        notes=(*notes, *_notes(method, subject, tokens, scored, fitted, _per_value(tallies, "doubts"))),
        figures=_figures(method, tallies, tokens, selections, tiers),
    )


def _per_value(tallies: Sequence[Tally], name: str) -> FloatArray:
    """(V, L) sums by attribute, or by name among the figures."""
    found = [one.figures[name] if name in one.figures else getattr(one, name) for one in tallies]
    return np.stack(found, axis=1).astype(np.float64)


def _stacked(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One array of several whose last axes may differ in length."""
    widest = max(one.shape[-1] for one in arrays)
    return np.stack([_wide(one, widest) for one in arrays])


def _wide(array: NDArray[np.generic], length: int) -> NDArray[np.generic]:
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])])


def _by_probability(method: Method, scored: bool) -> bool:
    return scored and method.name != "null_experts"


def _certainties(
    method: Method,
    known: FloatArray,
    own: FloatArray,
    tokens: NDArray[np.int64],
    scored: bool,
    other_gate: float,
) -> tuple[Certainty, ...]:
    """Per value."""
    best: Certainty = method.certainty
    if method.name == "top_p" and not scored:
        best = "proxy"
    if scored and not _agrees(own, tokens):
        best = "proxy"
    if other_gate > 1 - SOFTMAX and _by_probability(method, scored):
        best = "proxy"
    found: list[Certainty] = []
    for share in _pooled(known, tokens):
        found.append("needs a live run" if share < ANSWERED else "proxy" if share < PROVEN else best)
    return tuple(found)


def _pooled(shares: FloatArray, tokens: NDArray[np.int64]) -> FloatArray:
    return ratio((np.nan_to_num(shares) * tokens).sum(-1), tokens.sum(), empty=0.0)


def _agrees(own: FloatArray, tokens: NDArray[np.int64]) -> bool:
    return bool(_pooled(own, tokens) >= PROVEN)


def _changed_others(tallies: Sequence[Tally], tokens: NDArray[np.int64]) -> FloatArray:
    """(V, L) of the tokens with another set, the share whose recorded choice is not that of their largest logits."""
    changed = tokens - _per_value(tallies, "same")
    agreeing = np.array([one.agreeing for one in tallies]) - _per_value(tallies, "same_agreeing")
    return ratio(changed - agreeing, changed, empty=0.0)


def _pooled_others(tallies: Sequence[Tally], tokens: NDArray[np.int64]) -> float:
    """Of all values and layers, :func:`_changed_others`."""
    changed = tokens - _per_value(tallies, "same")
    return float((_changed_others(tallies, tokens) * changed).sum() / max(float(changed.sum()), 1.0))


def _why(
    method: Method, known: FloatArray, own: FloatArray, tokens: NDArray[np.int64], scored: bool, other_gate: float,
    others: float,
) -> str:  # fmt: skip
    """One sentence."""
    parts = []
    if not tokens.sum():
        return "No token of this part of the run used an expert in these layers."
    if scored and not _agrees(own, tokens):
        parts.append(
            f"{1 - float(_pooled(own, tokens)):.1%} of the choices are not those of the largest logits (the router adds"
            " a bias, or chooses by groups), so that rules on logits are not rules on its choice: what changes, and the"
            f" load before, are told from the largest logits, and {others:.1%} of the tokens that change are such"
        )
    if other_gate > 1 - SOFTMAX and _by_probability(method, scored):
        parts.append(
            f"gate weights are no softmax of the router's logits for {other_gate:.1%} of the tokens (such as a"
            " sigmoid), so that router probabilities here are not what its gate goes by"
        )
    if method.name == "top_p" and not scored:
        parts.append(
            "without router scores the gate weights of the recorded choice stand for probabilities, which are then"
            " shares of the choice alone, and no token can use more experts than it did"
        )
    if method.name == "smoothing":
        parts.append("likeness comes from router logits of the tokens before, not from hidden states or attention")
    least = float(_pooled(known, tokens).min())
    if least < PROVEN:
        parts.append(
            f"at the hardest value {1 - least:.1%} of the tokens would need scores beyond those that are stored"
        )
    if not parts:
        basis = "the stored scores prove the choice of every token" if scored else "the recorded choice is all it takes"
        parts.append(f"{basis}, for each layer on the inputs that it had")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _convention(method: Method, weights: Weights) -> str:
    if method.name in ("bias", "smoothing", "sinkhorn"):
        return "The router makes gate weights of the new choice as it does of its own."
    return _CONVENTION[weights]


def _notes(
    method: Method, subject: Subject, tokens: NDArray[np.int64], scored: bool, fitted: bool, doubts: FloatArray
) -> tuple[str, ...]:
    notes = []
    if not subject.gated_known:
        notes.append(
            "Operations are those of experts with a gate projection, as nearly all have: the run holds none of their"
            " weights to tell by (level activations). Shares do not depend on it."
        )
    most = int(tokens.max(initial=0))
    if most < subject.run_tokens:
        why = "; others have no router scores, or were not asked for" if scored else ""
        why += "; values were found on every other sequence of each domain, the rest judge" if fitted else ""
        notes.append(f"Rests on {most:,} of {subject.run_tokens:,} tokens{why}.")
    worst = float(ratio(doubts.sum(1), tokens.sum(), empty=0.0).max(initial=0.0))
    if worst > 0:
        notes.append(
            f"Gate weights are stored in 8 bits: at one of the values that may decide for {worst:.2%} of the tokens."
        )
    if method.name == "ratio" and fitted and max(layer.info.top_k for layer in subject.layers) > 2:
        notes.append("ODP is published for two experts per token; here its rule holds for each expert after the first.")
    if method.name == "sinkhorn":
        notes.append("Not causal: the plan of a batch is made of all of its tokens, later ones included.")
    return tuple(notes)


def _figures(
    method: Method,
    tallies: Sequence[Tally],
    tokens: NDArray[np.int64],
    selections: NDArray[np.int64],
    tiers: tuple[float, tuple[float, float]],
) -> dict[str, FloatArray]:
    """(V, L) the method's own figures."""
    if not all(one.figures for one in tallies):
        return {}
    if method.name == "tiers":
        shares = {
            f"{tier}_share": ratio(_per_value(tallies, f"{tier}_selections"), selections)
            for tier in ("high", "low", "skipped")
        }
        loaded = _per_value(tallies, "high_selections") + _per_value(tallies, "low_selections")
        traffic = ratio(_per_value(tallies, "bits_loaded"), loaded)
        seen = ratio(_per_value(tallies, "bits_by_weight"), _per_value(tallies, "kept"))
        stored = np.full_like(traffic, sum(tiers[1]))
        return shares | {"bits_traffic": traffic, "bits_seen": seen, "bits_stored": stored}
    if method.name == "smoothing":
        return smoothing_figures(tallies, tokens)
    if method.name == "sinkhorn":
        error = _per_value(tallies, "error_tokens")
        return {"overlap": ratio(_per_value(tallies, "kept_own"), selections), "marginal_error": ratio(error, tokens)}
    return {}


def smoothing_figures(tallies: Sequence[Tally], tokens: NDArray[np.int64]) -> dict[str, FloatArray]:
    """Entropy in nats, and the share of a token's experts that the token before used, before and after."""
    pairs = {name: _per_value(tallies, name) for name in ("shared", "shared_before", "neighbours", "neighbours_before")}
    return {
        "entropy": ratio(_per_value(tallies, "entropy"), tokens),
        "entropy_before": ratio(_per_value(tallies, "entropy_before"), tokens),
        "same_expert": ratio(pairs["shared"], pairs["neighbours"]),
        "same_expert_before": ratio(pairs["shared_before"], pairs["neighbours_before"]),
    }
