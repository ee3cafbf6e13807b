"""What a plan is predicted to cost: a divergence with an interval, and on what it rests.

From a run's sums alone (basis ``sums``), or corrected by plans of the same model that were measured (basis
``measured plans``): each decoder layer and kind of change gets a factor, drawn towards the typical one where little was
measured, and what is left over says how wide the interval has to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtrit

from compressor.plan import Plan, Prediction
from planner.estimate.stream import KINDS, Turned, stream_turns
from planner.task import Array, Task, rounded

TYPICAL = 1.25
"""KL divergence in nats over the summed change of the stream, on models and plans that were tried."""

SPREAD = 0.55
"""Standard deviation of its logarithm where nothing was measured: a factor of about 2.5 either way at 90 %."""

COVERAGE = 0.9
"""Part of measured values that intervals are to hold."""

_PULL = 0.4
"""How far (standard deviation of the logarithm) factors stray from the typical one before they were measured."""

_NOISE = 0.15
"""What a measured divergence is off by, as that of its logarithm."""

USUAL = 0.2
"""Spread that a kind of change has once the factors are those of the model, where little of it was measured."""

_LEAST = 0.12
"""The narrowest spread that is believed: texts differ."""

Turns = Mapping[int, Turned]


@dataclass(frozen=True)
class Calibration:
    """What measured plans of a model say of the next one.

    Attributes:
        factors: (decoder layer, kind) -> nats per change of the stream; what is missing counts as ``typical``.
        typical: of all of them.
        spread: standard deviation of the logarithm of measured over predicted, where a kind has none of its own.
        spreads: the same by kind of change; that of a plan is their mean, by what each kind costs it.
        count: plans behind it.
        tokens: text that each was measured on; 0 = nothing was measured.
    """

    factors: Mapping[tuple[int, str], float] = field(default_factory=dict)
    typical: float = TYPICAL
    spread: float = SPREAD
    spreads: Mapping[str, float] = field(default_factory=dict)
    count: int = 0
    tokens: int = 0

    def kl(self, turns: Turns) -> float:
        """Predicted KL divergence, nats per token."""
        return float(sum(self._by_kind(turns).values()))

    def spread_of(self, turns: Turns) -> float:
        """Standard deviation of the logarithm of measured over predicted, for what a plan changes."""
        costs = self._by_kind(turns)
        whole = sum(costs.values())
        if whole <= 0:
            return self.spread
        return sum(cost / whole * self.spreads.get(kind, self.spread) for kind, cost in costs.items())

    def _by_kind(self, turns: Turns) -> dict[str, float]:
        return {
            kind: sum(
                self.factors.get((layer, kind), self.typical) * getattr(one, kind) for layer, one in turns.items()
            )
            for kind in KINDS
        }

    def predict(self, turns: Turns) -> Prediction:
        """The same with its interval."""
        value = self.kl(turns)
        quantile = float(stdtrit(max(self.count - 1, 3) if self.count else 30, (1 + COVERAGE) / 2))
        width = float(np.exp(quantile * self.spread_of(turns)))
        short = rounded(np.array([value, value / width, value * width])).tolist()
        basis = "measured plans" if self.count else "sums"
        return Prediction(kl=short[0], low=short[1], high=short[2], coverage=COVERAGE, basis=basis, plans=self.count)  # type: ignore[arg-type]

    def content(self) -> dict[str, Any]:
        """As plain data, for a file."""
        factors = [[layer, kind, value] for (layer, kind), value in sorted(self.factors.items())]
        plain = {name: getattr(self, name) for name in ("typical", "spread", "count", "tokens")}
        return {**plain, "spreads": dict(self.spreads), "factors": factors}

    @staticmethod
    def of(content: Mapping[str, Any]) -> Calibration:
        """From plain data."""
        factors = {(int(layer), str(kind)): float(value) for layer, kind, value in content["factors"]}
        spreads = {str(kind): float(value) for kind, value in content.get("spreads", {}).items()}
        return Calibration(
            factors, float(content["typical"]), float(content["spread"]), spreads, int(content["count"]),
            int(content["tokens"]),
        )  # fmt: skip


def predict(plan: Plan, task: Task, calibration: Calibration | None = None) -> Prediction | None:
    """The predicted cost of a plan; None where the run cannot price it."""
    turns = stream_turns(plan, task)
    return None if turns is None else (calibration or Calibration()).predict(turns)


def calibrate(measured: Sequence[tuple[Turns, float]], *, tokens: int) -> Calibration:
    """Factors by layer and kind that explain what measured plans cost; the spread is that of plans left out in turn.

    Args:
        measured: (what the plan changes, its measured KL divergence), of one model and one text.
        tokens: of that text.
    """
    usable = [(turns, kl) for turns, kl in measured if kl > 0 and sum(one.total for one in turns.values()) > 0]
    if len(usable) < 3:
        return Calibration()
    names = sorted({(layer, kind) for turns, _ in usable for layer, one in turns.items() for kind in KINDS
                    if getattr(one, kind) > 0})  # fmt: skip
    changes = np.array([[getattr(turns.get(layer, Turned()), kind) for layer, kind in names] for turns, _ in usable])
    logs = np.log([kl for _, kl in usable])
    factors, typical = _fit(changes, logs)
    # Plans that change several layers are what is to be predicted; those of one layer are what it is learnt from.
    several = [place for place, row in enumerate(changes) if np.count_nonzero(row > 0.02 * row.sum()) > 1]
    left = several if len(several) >= 4 else list(range(len(usable)))
    errors = []
    for place in left:
        others = np.arange(len(usable)) != place
        own, _ = _fit(changes[others], logs[others])
        errors.append(float(logs[place] - np.log(changes[place] @ own)))
    spread, spreads = _spreads(errors, [_shares(names, changes[place] * factors) for place in left])
    found = {name: float(value) for name, value in zip(names, rounded(factors), strict=True)}
    return Calibration(found, float(rounded(np.array(typical))), spread, spreads, len(left), tokens)


def _shares(names: Sequence[tuple[int, str]], costs: Array) -> dict[str, float]:
    """Kind -> its part of what a plan costs."""
    whole = float(costs.sum())
    return {kind: float(sum(cost for (_, one), cost in zip(names, costs, strict=True) if one == kind)) / whole
            for kind in KINDS}  # fmt: skip


def _spreads(errors: Sequence[float], shares: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]:
    """The spread of all errors, and by kind: each error counts for a kind by the kind's part of the plan's cost.

    A kind of which little was measured is drawn towards :data:`USUAL`.
    """
    squares, by_kind = np.square(errors), {}
    for kind in KINDS:
        weights = np.array([one[kind] for one in shares])
        if weights.sum() > 0.5:
            mean = (float(weights @ squares) + 2 * USUAL**2) / (float(weights.sum()) + 2)
            by_kind[kind] = max(float(rounded(np.array(np.sqrt(mean)))), _LEAST)
    return max(float(rounded(np.array(np.sqrt(squares.mean())))), _LEAST), by_kind


def _fit(changes: Array, logs: Array) -> tuple[Array, float]:
    """(columns,) factors and their typical value: least squares of logarithms, each factor drawn to the typical one."""
    from scipy.optimize import least_squares  # here, as it takes half a second to import

    def residuals(logged: Array) -> Array:
        with np.errstate(over="ignore"):
            predicted = np.log(np.maximum(changes @ np.exp(logged[1:] + logged[0]), 1e-300))
        pulls = np.concatenate([[(logged[0] - np.log(TYPICAL)) / 1.0], logged[1:] / _PULL])
        return np.concatenate([(predicted - logs) / _NOISE, pulls])

    start = np.zeros(changes.shape[1] + 1)
    start[0] = np.log(TYPICAL)
    found = least_squares(residuals, start, method="trf", loss="soft_l1", max_nfev=200).x
    return np.exp(found[1:] + found[0]), float(np.exp(found[0]))
