"""Finalists: ranked by what a callable measures, each once, with reasons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import planner
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.finalists import Damage
from tests.planner.collected import sample


@pytest.fixture(scope="module")
def plans() -> Iterator[list[Plan]]:
    with sample() as run:
        yield [planner.make(run, preset=name, share=0.25) for name in ("random", "set_search", "reap")]


MEASURED = {
    "random": planner.Measurement(0.9, 0.8, 1.0, 500),
    "set_search": planner.Measurement(
        0.10, 0.08, 0.12, 500, domains={"code": Damage(0.05, 0.04, 0.06, 200), "german": Damage(0.14, 0.1, 0.2, 300)}
    ),
    "reap": planner.Measurement(0.11, 0.09, 0.13, 500),
}


def test_the_least_damaging_comes_first(plans: list[Plan]) -> None:
    asked: list[str] = []

    def measure(plan: Plan) -> planner.Measurement:
        asked.append(plan.target.preset)
        return MEASURED[plan.target.preset]

    ranking = planner.choose([*plans, plans[0]], measure)
    assert [one.plan.target.preset for one in ranking] == ["set_search", "reap", "random"]
    assert sorted(asked) == sorted(MEASURED)  # identical plans once
    first, second, last = ranking
    assert first.measurement is MEASURED["set_search"]
    assert "not told apart" in first.reasons[0] and "KL 0.1 (0.08 to 0.12) and 0.11" in first.reasons[0]
    assert second.reasons[0].endswith("better")
    assert "worst domain german: KL 0.14 over 300 tokens" in first.reasons
    assert last.reasons == ("removes 25.0% of the experts' parameters",)


def test_candidates_for_different_models_or_none_are_refused(plans: list[Plan]) -> None:
    with pytest.raises(PlanError, match="there is no candidate"):
        planner.choose([], lambda plan: MEASURED["reap"])
    other = plans[0].model_copy(update={"source": plans[0].source.model_copy(update={"fingerprint": "another"})})
    with pytest.raises(PlanError, match="for different models"):
        planner.choose([plans[1], other], lambda plan: MEASURED["reap"])


def test_a_measurement_that_fails_is_not_hidden(plans: list[Plan]) -> None:
    def measure(plan: Plan) -> planner.Measurement:
        raise PlanError("gone")

    with pytest.raises(PlanError, match="gone"):
        planner.choose(plans, measure)


def test_plans_that_only_quantize_say_their_bits() -> None:
    with sample() as run:
        plan = planner.make(run, preset="error_bits", bits=3.0)
        both = planner.make(run, preset="reap", share=0.25, bits=4.5)
    for one, words in ((plan, f"stores an expert's weight in {plan.estimate.bits:.3g} bits"), (both, "and stores")):
        (ranked,) = planner.choose([one], lambda _: MEASURED["reap"])
        assert words in ranked.reasons[-1] and "removes 0.0%" not in ranked.reasons[-1]
