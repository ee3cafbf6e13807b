"""What a recommendation is made of: candidates in their order, the verdict, and what each figure rests on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, overload

from compressor.plan import Plan, Prediction, SlimStep
from moescope.errors import PlanError
from planner.estimate.prediction import Calibration
from planner.finalists import Damage, Measurement

Verdict = Literal["apply", "with care", "leave it"]
"""``apply``: the best plan costs little. ``with care``: it costs something that may matter. ``leave it``: everything
fits as it is, nothing reaches the size, or what reaches it costs more than was allowed."""

CARE, LEAVE = 0.05, 0.5
"""KL divergence in nats per token from which a plan is to be applied with care, or not at all, where no quality was
asked for: about a change of perplexity by 5 % and by 60 %."""


CAUTION = 1.1
"""By how much dearer plans count that slim, where runs keep neurons pooled over domains: on other text they lose a
little more than narrower widths do."""

KEPT = 16
"""Candidates whose plans are kept whole where a recommendation is written; of the others, what they take and cost."""

TOLERATED = 1.5
"""How many times as much a plan may cost on a domain that it was not made from without losing rank: narrower widths
cost about that; dropped experts can cost many times as much."""


@dataclass(frozen=True)
class Candidate:
    """A plan, what it takes, and what it costs.

    Attributes:
        plan: the plan.
        mix: its steps in words, such as ``slim + quantize``.
        bytes: of all weights afterwards: the experts', and the others where these were given.
        prediction: of its divergence; None where the run cannot price it.
        measurement: of its divergence; None where it was not measured.
        elsewhere: predicted divergence on text of a domain that it was not made from: the mean over domains of what the
            same recipe without the domain costs on it; None where the run has one domain, keeps what the plan rests on
            pooled over domains, or it was not worked out.
        recipe: arguments of :func:`planner.make` that give it; empty where a search found it.
        reasons: why it stands where it stands.
        risks: what to look at before it is used.
    """

    plan: Plan
    mix: str
    bytes: int
    prediction: Prediction | None = None
    measurement: Measurement | None = None
    elsewhere: float | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reasons: tuple[str, ...] = ()
    risks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The preset, and the share it cuts where it cuts any."""
        target = self.plan.target
        return target.preset if target.share is None else f"{target.preset} ({target.share:.3g})"

    @property
    def kl(self) -> float | None:
        """What it costs: measured, else predicted; None where nobody knows."""
        if self.measurement is not None:
            return self.measurement.kl
        return None if self.prediction is None else self.prediction.kl

    @property
    def score(self) -> float:
        """What candidates are ranked by: their cost, dearer where text unlike the run's is predicted to cost far more.

        All plans cost more on text that they were not made from; above :data:`TOLERATED` times as much, the cost rises
        in proportion. Plans that slim, of which that is not known, count :data:`CAUTION` times. Infinity where nothing
        is known.
        """
        if self.kl is None:
            return float("inf")
        if self.elsewhere is None or self.prediction is None or self.prediction.kl <= 0:
            slims = any(isinstance(step, SlimStep) for step in self.plan.steps)
            return self.kl * CAUTION if slims else self.kl
        return self.kl * max(1.0, self.elsewhere / self.prediction.kl / TOLERATED)


def mix_of(plan: Plan) -> str:
    """Its steps in words."""
    return " + ".join(dict.fromkeys(step.step for step in plan.steps))


@dataclass(frozen=True)
class Recommendation(Sequence[Plan]):
    """What to do with a budget. As a sequence, its plans, the best first.

    Attributes:
        verdict: see :data:`Verdict`.
        reasons: why.
        candidates: the best first; measured ones before others.
        memory: bytes that the weights may take.
        bytes_before: bytes that they take now.
        refused: presets that gave no plan, and why.
        calibration: what predictions rest on.
        evidence: how predictions and measurements were made, in a sentence each.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    memory: int
    bytes_before: int
    refused: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    evidence: tuple[str, ...] = ()

    @overload
    def __getitem__(self, place: int) -> Plan: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Plan]: ...
    def __getitem__(self, place: int | slice) -> Plan | Sequence[Plan]:
        plans = [candidate.plan for candidate in self.candidates]
        return plans[place]

    def __len__(self) -> int:
        return len(self.candidates)

    def content(self) -> dict[str, Any]:
        """As plain data, for a file: what is kept beside the run, and shown by pages. Plans are in it whole."""
        return {
            "kind": "recommendation",
            **{name: getattr(self, name) for name in ("verdict", "memory", "bytes_before")},
            **{name: list(getattr(self, name)) for name in ("reasons", "evidence")},
            "refused": dict(self.refused),
            "calibration": self.calibration.content(),
            "candidates": [_candidate_content(one) for one in self.candidates[:KEPT]],
            "others": [
                {"name": one.name, "mix": one.mix, "bytes": one.bytes, "kl": one.kl} for one in self.candidates[KEPT:]
            ],
        }

    @staticmethod
    def of(content: Mapping[str, Any]) -> Recommendation:
        """From plain data.

        Raises:
            PlanError: it is no recommendation, or a plan in it cannot be followed.
        """
        try:
            return Recommendation(
                verdict=content["verdict"], reasons=tuple(content["reasons"]), memory=int(content["memory"]),
                bytes_before=int(content["bytes_before"]), refused=dict(content["refused"]),
                candidates=tuple(_candidate_of(one) for one in content["candidates"]),
                calibration=Calibration.of(content["calibration"]), evidence=tuple(content["evidence"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no recommendation of moescope: {error}") from error


def _candidate_content(one: Candidate) -> dict[str, Any]:
    return {
        "plan": one.plan.model_dump(mode="json"),
        **{name: getattr(one, name) for name in ("mix", "bytes", "elsewhere")},
        "prediction": None if one.prediction is None else one.prediction.model_dump(mode="json"),
        "measurement": None if one.measurement is None else asdict(one.measurement),
        "recipe": dict(one.recipe),
        **{name: list(getattr(one, name)) for name in ("reasons", "risks")},
    }


def _candidate_of(content: Mapping[str, Any]) -> Candidate:
    measured, price = content["measurement"], content["prediction"]
    if measured is not None:
        domains = {name: Damage(**values) for name, values in measured["domains"].items()}
        measured = Measurement(**{**measured, "domains": domains})
    return Candidate(
        plan=Plan.parse(json.dumps(content["plan"]), "a plan of the recommendation"), mix=content["mix"],
        bytes=int(content["bytes"]), prediction=None if price is None else Prediction(**price), measurement=measured,
        elsewhere=content["elsewhere"], recipe=dict(content["recipe"]), reasons=tuple(content["reasons"]),
        risks=tuple(content["risks"]),
    )  # fmt: skip
