"""Finalists: candidates ranked by what they were measured to cost. The planner itself runs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from compressor.plan import Plan
from moescope.errors import PlanError


@dataclass(frozen=True)
class Damage:
    """What one text says.

    Attributes:
        kl: mean KL divergence from the model as it was, nats per token.
        low: lower end of its 95 % interval.
        high: upper end.
        tokens: tokens behind it.
    """

    kl: float
    low: float
    high: float
    tokens: int


@dataclass(frozen=True)
class Measurement(Damage):
    """What a plan was measured to cost: over all held-out text, and domain by domain.

    Attributes:
        domains: the same per domain.
    """

    domains: Mapping[str, Damage] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranked:
    """One candidate in its place.

    Attributes:
        plan: the candidate.
        measurement: what it costs.
        reasons: why it stands where it stands: against the one behind it, and its worst domain.
    """

    plan: Plan
    measurement: Measurement
    reasons: tuple[str, ...]


def choose(candidates: Sequence[Plan], measure: Callable[[Plan], Measurement]) -> list[Ranked]:
    """The candidates, the least damaging first; each is measured once.

    Where the intervals of two neighbours overlap, the ranking does not tell them apart, and the reason says so.
    Identical plans are measured once and stand once.

    Args:
        candidates: plans for one model, best of one size: damages are comparable only then.
        measure: runs the model with and without the plan on held-out text.

    Raises:
        PlanError: no candidate, or candidates for different models.
    """
    if not candidates:
        raise PlanError("there is no candidate to choose from: make some plans first")
    first = candidates[0].source
    for plan in candidates:
        if (plan.source.layers, plan.source.fingerprint) != (first.layers, first.fingerprint):
            raise PlanError(f"the candidates are for different models: {first.model} and {plan.source.model}")
    distinct = {plan.digest: plan for plan in candidates}
    measured = [(measure(plan), plan) for plan in distinct.values()]
    measured.sort(key=lambda pair: (pair[0].kl, pair[1].digest))
    behind = [*measured[1:], None]
    return [
        Ranked(plan, measurement, tuple(_reasons(plan, measurement, after)))
        for (measurement, plan), after in zip(measured, behind, strict=True)
    ]


def _reasons(plan: Plan, mine: Measurement, after: tuple[Measurement, Plan] | None) -> list[str]:
    reasons = []
    if after is not None:
        other, theirs = after
        verdict = "better" if mine.high < other.low else "not told apart"
        reasons.append(
            f"{_named(plan)} against {_named(theirs)}: KL {mine.kl:.4g} ({mine.low:.4g} to {mine.high:.4g}) and"
            f" {other.kl:.4g} ({other.low:.4g} to {other.high:.4g}): {verdict}"
        )
    if mine.domains:
        name, worst = max(mine.domains.items(), key=lambda item: (item[1].kl, item[0]))
        reasons.append(f"worst domain {name}: KL {worst.kl:.4g} over {worst.tokens:,} tokens")
    reasons.append(_taken(plan))
    return reasons


def _taken(plan: Plan) -> str:
    """What a plan takes from the experts, in a few words."""
    estimate = plan.estimate
    gone = estimate.expert_parameters - estimate.expert_parameters_after
    parts = [f"removes {gone / max(estimate.expert_parameters, 1):.1%} of the experts' parameters"] if gone else []
    if estimate.bits is not None:
        parts.append(f"stores an expert's weight in {estimate.bits:.3g} bits")
    return " and ".join(parts) or f"saves {estimate.bytes_saved:,} bytes"


def _named(plan: Plan) -> str:
    return f"{plan.target.preset}, {' and '.join(step.form for step in plan.for_checkpoint)}"
