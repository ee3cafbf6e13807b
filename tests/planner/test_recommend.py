"""Recommendations on a tiny run: verdicts, ranks, planted landscapes that are measured and searched, files, risks."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import planner
import store
from compressor.plan import PARTS, Plan, Prediction, QuantizeStep, bits_after
from moescope.errors import PlanError
from planner import candidates as all_candidates
from planner.candidates import Request
from planner.curve import curve, pareto
from planner.estimate.prediction import Calibration
from planner.estimate.storage import expert_bytes
from planner.estimate.stream import KINDS, stream_turns
from planner.finalists import Damage, Measurement
from planner.presets import PRESETS
from planner.recommendation import CARE, KEPT, LEAVE, TOLERATED, Candidate, Recommendation
from planner.risks import risks_of
from tests.planner.collected import collected
from tests.profiler.capture.tiny import build

BEFORE = 2 * 8 * 3 * 64 * 32 * 4
"""Bytes of the experts: two layers of eight, 64 x 32, float32."""

MEMORY = 45_000
FEW = ("budgeted_reap", "reap", "camera_p", "stream_slim", "hc_smoe", "error_bits", "mixed", "edgemoe", "uniform_bits",
       "heapr", "random")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_presets() -> Iterator[None]:
    """A tenth of the time: every kind of step, some forms, one that the run cannot give and one that is no advice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_candidates, "PRESETS", tuple(one for one in PRESETS if one.name in FEW))
        mixtures = (("stream_slim", "per_layer"), ("budgeted_reap", "per_layer"), ("hc_smoe", "shared"))
        patch.setattr(all_candidates, "MIXTURES", mixtures)
        patch.setattr(importlib.import_module("planner.advice"), "PRICED_ELSEWHERE", 3)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    model = build("olmoe", num_hidden_layers=2, intermediate_size=32)
    folder = tmp_path_factory.mktemp("recommend")
    with collected(model, folder, level="activations,similarity,errors", errors_every=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def priced(run: store.Run) -> Recommendation:
    return planner.recommend(run, memory=MEMORY)


def planted(run: store.Run, **factors: float) -> Callable[[Plan], Measurement]:
    """What a plan costs where changes of the two layers cost what nobody told the planner: twentieth and four times."""
    task = Request(run=run, memory=MEMORY).task()

    def measure(plan: Plan) -> Measurement:
        turns = stream_turns(plan, task)
        assert turns is not None
        kl = sum(
            {0: 0.05, 1: 4.0}[layer] * factors.get(kind, 1.0) * getattr(one, kind)
            for layer, one in turns.items() for kind in KINDS
        )  # fmt: skip
        return Measurement(kl, 0.9 * kl, 1.1 * kl, 500, {"code": Damage(kl, 0.8 * kl, 1.2 * kl, 300)})

    return measure


@pytest.fixture(scope="module")
def searched(run: store.Run) -> Recommendation:
    return planner.recommend(run, memory=MEMORY, measure=planted(run), generations=3)


def _sizes_are_met(run: store.Run, found: Recommendation) -> None:
    assert len(found) > 0
    for one in found.candidates:
        assert one.bytes == expert_bytes(one.plan, source_bits=32) <= found.memory
        assert one.plan == one.plan.checked() == Plan.parse(one.plan.text())


def test_prices_rank_plans_that_fit(run: store.Run, priced: Recommendation) -> None:
    _sizes_are_met(run, priced)
    assert list(priced) == [one.plan for one in priced.candidates] and priced[0] is priced.candidates[0].plan
    scores = [one.score for one in priced.candidates]
    assert scores == sorted(scores)
    assert (priced.memory, priced.bytes_before) == (MEMORY, BEFORE)
    assert {step.step for plan in priced for step in plan.steps} == {"drop", "merge", "slim", "quantize"}
    assert "needs gradients" in priced.refused["heapr"]
    assert not {"random"} & {one.plan.target.preset for one in priced.candidates}
    assert all(one.measurement is None for one in priced.candidates)
    best = priced.candidates[0]
    assert best.prediction is not None and best.prediction.basis == "sums"
    task = Request(run=run, memory=MEMORY).task()
    turns = stream_turns(best.plan, task)
    assert turns is not None
    assert best.kl == pytest.approx(Calibration().typical * sum(one.total for one in turns.values()), rel=1e-5)
    assert f"predicted to cost {best.kl:.3g} nats" in priced.reasons[0]


def _does(plan: Plan) -> Any:
    """The same for plans of the same widths, whoever found them and however he counted."""
    cuts = [step.model_dump_json(exclude={"method", "grouping"}) for step in plan.steps
            if not isinstance(step, QuantizeStep)]  # fmt: skip
    widths = sorted((unit, *(entry.of(part) for part in PARTS), step.group_size, step.symmetric, step.form)
                    for unit, (entry, step) in bits_after(plan).items())  # fmt: skip
    return json.dumps([cuts, widths])


def test_candidates_do_different_things(run: store.Run) -> None:
    """At a size where every preset that quantizes gives all experts 8 bits, that stands once."""
    roomy = planner.recommend(run, memory=120_000)
    for found in (roomy, planner.recommend(run, memory=MEMORY)):
        done = [_does(plan) for plan in found]
        assert len(set(done)) == len(done)
    alone = [one for one in roomy.candidates if one.mix == "quantize"]
    assert len(alone) == 1 and {entry.up for entry, _ in bits_after(alone[0].plan).values()} == {8}


@pytest.mark.parametrize("memory", ["3MB", BEFORE, "400 KB", "0.5GiB"])
def test_what_fits_is_left(run: store.Run, memory: Any) -> None:
    found = planner.recommend(run, memory=memory)
    assert found.verdict == "leave it" and not len(found) and not found.candidates
    assert f"{BEFORE:,} bytes and fit" in found.reasons[0]
    beside = planner.recommend(run, memory=BEFORE + 10, other_weights=11)
    assert beside.bytes_before == BEFORE + 11 and len(beside)


def test_what_nothing_reaches_is_left(run: store.Run) -> None:
    found = planner.recommend(run, memory="5KB")
    assert found.verdict == "leave it" and not len(found) and found.refused
    assert "5,000 bytes or less" in found.reasons[0] and f"{BEFORE:,}" in found.reasons[0]
    named = re.search(r"nearest that can be reached is ([\d,]+) bytes", found.reasons[1])
    assert named is not None
    nearest = int(named[1].replace(",", ""))
    assert 5_000 < nearest < BEFORE and len(planner.recommend(run, memory=nearest))


def test_quality_bounds_what_is_advised(run: store.Run, priced: Recommendation) -> None:
    best = priced.candidates[0].kl
    assert best is not None
    for quality, verdict in ((best * 1.01, "apply"), (best * 0.99, "leave it")):
        found = planner.recommend(run, memory=MEMORY, quality=quality)
        assert found.verdict == verdict and list(found) == list(priced)
        assert ("more than was allowed" in found.reasons[0]) == (verdict == "leave it")
    assert priced.verdict == ("apply" if best <= CARE else "with care" if best <= LEAVE else "leave it")


def test_every_engine_loads_what_any_asks_for(run: store.Run) -> None:
    found = planner.recommend(run, memory=200_000, engine="any")
    _sizes_are_met(run, found)
    assert {step.form for plan in found for step in plan.steps} == {"uniform"}
    assert {plan.target.engine for plan in found} == {"any"}


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"memory": "12 apples"}, "'12 apples' is no size of memory: write 12GiB"),
        ({"memory": ""}, "'' is no size of memory"),
        ({"memory": 0}, "memory 0 is no number of bytes"),
        ({"memory": -5}, "memory -5 is no number of bytes"),
        ({"memory": "0.2B"}, "memory 0 is no number of bytes"),
        ({"memory": 1000, "other_weights": 1000}, "the other weights alone take 1,000 of 1,000 bytes"),
        ({"memory": MEMORY, "domains": ["cod"]}, "no domain 'cod': did you mean 'code'?"),
        ({"memory": MEMORY, "engine": "tgi"}, "engine 'tgi' is not known"),
    ],
)
def test_what_cannot_be_is_refused(run: store.Run, asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(PlanError, match=re.escape(sentence)):
        planner.recommend(run, **asked)


def test_runs_that_did_not_see_the_stream_say_so(tmp_path: Path) -> None:
    model = build("olmoe", num_hidden_layers=2, intermediate_size=32)
    with collected(model, tmp_path, level="errors", errors_every=8) as bare:
        found = planner.recommend(bare, memory=MEMORY)
        assert found.verdict == "with care" and "Nobody can say what these plans cost" in found.reasons[0]
        assert {one.score for one in found.candidates} == {float("inf")} and "reap" in found.refused


def test_the_measured_best_comes_first(run: store.Run) -> None:
    """Slimming is planted to cost next to nothing: prices do not know, measurements do."""
    said: list[str] = []
    measure = planted(run, slimmed=1e-3, bits=100.0, cut=300.0, merged=300.0)
    found = planner.recommend(run, memory=150_000, measure=measure, finalists=4, tell=said.append)
    _sizes_are_met(run, found)
    done = [one for one in found.candidates if one.measurement is not None]
    assert [one.measurement for one in done] == [measure(one.plan) for one in done]
    assert found.candidates[: len(done)] == tuple(done) and 4 <= len(done) <= 6
    assert [one.score for one in done] == sorted(one.score for one in done)
    everything = {one.plan.digest: measure(one.plan).kl for one in found.candidates}
    assert found.candidates[0].kl == min(everything.values())
    assert found.candidates[0].mix == "slim" and "measured to cost" in found.reasons[0]
    assert found.calibration.count >= 3 and found.calibration.tokens == 500
    unmeasured = [one for one in found.candidates if one.measurement is None and one.prediction is not None]
    assert {one.prediction.basis for one in unmeasured if one.prediction is not None} == {"measured plans"}
    assert any("measuring finalist 1 of" in text for text in said)


def test_corrected_prices_are_what_is_measured(run: store.Run, searched: Recommendation) -> None:
    """Plans that were not measured: their prices are near what they would be measured to cost, typical ones are not."""
    measure, task = planted(run), Request(run=run, memory=MEMORY).task()
    corrected, typical = [], []
    for one in searched.candidates:
        turns = stream_turns(one.plan, task)
        if one.measurement is None and turns is not None:
            true = measure(one.plan).kl
            corrected.append(abs(math.log(one.kl / true)))  # type: ignore[operator]
            typical.append(abs(math.log(Calibration().kl(turns) / true)))
    assert len(corrected) >= 4
    assert np.mean(corrected) < 0.15 and np.mean(typical) > 0.4, (np.mean(corrected), np.mean(typical))


def test_the_search_finds_better_plans_of_the_size(run: store.Run, searched: Recommendation) -> None:
    without = planner.recommend(run, memory=MEMORY, measure=planted(run))
    _sizes_are_met(run, searched)
    assert searched.candidates[0].score <= without.candidates[0].score
    # The layers' widths have to be told apart by eighty times, which no preset does by itself.
    assert searched.candidates[0].kl < 0.9 * without.candidates[0].kl  # type: ignore[operator]
    assert any("Found by the search" in reason for reason in searched.candidates[0].reasons)
    done = [_does(plan) for plan in searched]
    assert len(set(done)) == len(done)


def test_the_same_again_is_the_same(run: store.Run, searched: Recommendation) -> None:
    again = planner.recommend(run, memory=MEMORY, measure=planted(run), generations=3)
    assert again.content() == searched.content()


def test_without_what_engines_load_nothing_is_searched(run: store.Run) -> None:
    measure = planted(run)
    plain, more = (planner.recommend(run, memory=200_000, engine="any", measure=measure, generations=n) for n in (0, 2))
    assert list(plain) == list(more)


def test_a_file_gives_it_back(searched: Recommendation, priced: Recommendation) -> None:
    for one in (searched, priced):
        again = Recommendation.of(json.loads(json.dumps(one.content())))
        first = one.candidates[: len(again)]
        assert len(again) == min(len(one), KEPT) and list(again) == list(one)[:KEPT]
        for name in ("name", "mix", "bytes", "score", "prediction", "measurement", "elsewhere", "reasons", "risks"):
            assert [getattr(c, name) for c in again.candidates] == [getattr(c, name) for c in first], name
        assert [c.recipe for c in again.candidates] == json.loads(json.dumps([dict(c.recipe) for c in first]))
        assert again.content()["candidates"][0]["plan"] == one.content()["candidates"][0]["plan"]
        assert again.calibration == one.calibration and again.verdict == one.verdict
    damaged = json.loads(json.dumps(priced.content()))
    damaged["candidates"][0]["plan"]["steps"] = [{"step": "erase"}]
    for content in ({}, {**priced.content(), "candidates": [{}]}, {**priced.content(), "memory": "much"}, damaged):
        with pytest.raises(PlanError):
            Recommendation.of(content)


def _candidate(priced: Recommendation, **changes: Any) -> Candidate:
    (plain,) = [one for one in priced.candidates if one.plan.target.preset == "uniform_bits"] or [priced.candidates[0]]
    return replace(plain, **changes)


def test_ranks_count_text_unlike_the_runs(priced: Recommendation) -> None:
    price = Prediction(kl=0.1, low=0.05, high=0.2, coverage=0.9, basis="sums")
    one = _candidate(priced, prediction=price, elsewhere=None)
    assert one.score == one.kl == 0.1
    for elsewhere, times in ((0.05, 1.0), (0.15, 1.0), (0.3, 2.0), (0.6, 4.0)):
        assert replace(one, elsewhere=elsewhere).score == pytest.approx(0.1 * times)
    measured = replace(one, elsewhere=0.3, measurement=Measurement(0.4, 0.3, 0.5, 10))
    assert (measured.kl, measured.score) == (0.4, pytest.approx(0.4 * 3 / TOLERATED))
    assert _candidate(priced, prediction=None).score == float("inf")


def test_risks_are_told(run: store.Run, priced: Recommendation) -> None:
    told = {kind: [text for text in risks_of(priced.candidates[0], run) if text.startswith(kind)]
            for kind in ("Reasoning", "Domain", "Text", "Coverage", "Loading")}  # fmt: skip
    load = run.table("expert_load").group_by("layer", "expert").agg(pl.col("tokens").sum())
    thin = 16 - int((load["tokens"] >= 128).sum())
    assert thin > 0 and f"{thin} of 16 experts" in told["Coverage"][0]
    assert not told["Domain"] and "packed weights" in told["Loading"][0]
    assert "--vectors-per-domain" in told["Text"][0]  # it slims, and neurons are pooled
    plain = next(one for one in priced.candidates if one.mix == "quantize")
    assert not [text for text in risks_of(replace(plain, elsewhere=None), run) if text.startswith("Text")]
    for one in planner.recommend(run, memory=34_000).candidates:
        bits = one.plan.estimate.bits
        warned = any(text.startswith(f"Reasoning: at {bits or 0:.3g} bits") for text in risks_of(one, run))
        assert warned == (bits is not None and bits <= 3)
    cut = next(one for one in priced.candidates if one.plan.steps[0].form == "per_layer")
    assert any("layers differ" in text for text in risks_of(cut, run))


def test_risks_of_domains(run: store.Run, priced: Recommendation) -> None:
    mean, low = Damage(0.1, 0.1, 0.1, 9), Damage(0.05, 0.1, 0.1, 9)

    def risks(worst: float, **changes: Any) -> str:
        domains = {"code": low, "german": replace(mean, kl=worst)}
        found = Measurement(0.1, 0.1, 0.1, 18, domains)
        return " ".join(risks_of(_candidate(priced, measurement=found, **changes), run))

    assert "Domain german loses most: 0.25 nats, 2.5 times the mean." in risks(0.25)
    assert "loses most" not in risks(0.19)
    price = Prediction(kl=0.1, low=0.05, high=0.2, coverage=0.9, basis="sums")
    assert "cost 3.0 times as much on a domain" in risks(0.1, prediction=price, elsewhere=0.3)
    assert "Text unlike" not in risks(0.1, prediction=price, elsewhere=0.19)


@pytest.fixture(scope="module")
def points(run: store.Run) -> list[Candidate]:
    return curve(Request(run=run, memory=1), sizes=(0.1, 0.2, 0.4))


def test_a_curve_is_in_order_and_within_its_sizes(points: list[Candidate]) -> None:
    sizes = [one.bytes for one in points]
    assert sizes == sorted(sizes) and max(sizes) <= 0.4 * BEFORE and min(sizes) <= 0.1 * BEFORE
    assert len({one.plan.digest for one in points}) == len(points)


def test_no_point_of_the_front_is_dominated(points: list[Candidate]) -> None:
    front = pareto(points)
    assert 3 <= len(front) < len(points)
    assert [one.bytes for one in front] == sorted({one.bytes for one in front})
    assert [one.score for one in front] == sorted({one.score for one in front}, reverse=True)
    best = [one for one in points
            if not any(other.bytes <= one.bytes and other.score <= one.score
                       and (other.bytes, other.score) != (one.bytes, one.score) for other in points)]  # fmt: skip
    assert {(one.bytes, one.score) for one in front} == {(one.bytes, one.score) for one in best}
    unknown = replace(points[0], prediction=None, bytes=1)
    assert pareto([unknown, *points]) == front
