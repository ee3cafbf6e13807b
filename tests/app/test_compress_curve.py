"""Size against predicted cost, widths, and where the cost comes from: frames beside the planner, figures too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import polars as pl
import pytest

import planner
import store
from app.commands.recommend import curve_content
from app.figures import compress_bits as bits_figures
from app.figures import compress_curve as figures
from app.figures import expert_errors as error_figures
from app.frames import compress_bits as bits
from app.frames import compress_check as checks
from app.frames import compress_curve as frames
from app.frames import expert_errors
from compressor.plan import BITS, PARTS, ExpertBits, Plan, Prediction, QuantizeLayer, QuantizeStep
from moescope.errors import StoreError
from planner import curve
from planner.candidates import Request
from planner.estimate.prediction import Calibration
from planner.finalists import Measurement
from planner.quantize.errors import layer_errors
from planner.recommendation import Candidate, Recommendation
from sample_data import RUN

WHOLE = 96 * 3 * 128 * 128 * 2
"""Bytes of the sample's experts: six layers of 16, three projections of 128 x 128 in 16 bits."""


@pytest.fixture(scope="module")
def run() -> Any:
    with store.open_run(RUN) as opened:
        yield opened


@pytest.fixture(scope="module")
def tried(run: store.Run) -> list[Candidate]:
    """What a first look finds at two sizes with two presets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "QUICK_PRESETS", ("error_bits", "budgeted_reap"))
        patch.setattr(frames, "QUICK_SIZES", (0.3, 0.6))
        return frames.first_look(run)


def quantizing(widths: dict[int, dict[int, dict[str, Any]]]) -> Plan:
    """Of the model by hand: layer -> expert -> widths of its projections."""
    layers = tuple(
        QuantizeLayer(layer=layer, experts=tuple(ExpertBits(expert=expert, **own) for expert, own in experts.items()))
        for layer, experts in widths.items()
    )
    source = by_hand.source().model_copy(update={"hidden_size": 32, "expert_size": 32})
    shapes = tuple(shape.model_copy(update={"width": 32}) for shape in source.layers)
    step = QuantizeStep(method="by hand", form="dense", group_size=32, layers=layers)
    return by_hand.plan(*by_hand.dropping().steps[:0], step, source=source.model_copy(update={"layers": shapes}))


def candidate(size: int, kl: float | None, *, name: str = "reap", measured: float | None = None) -> Candidate:
    """A plan by hand with another name and other figures."""
    price = None if kl is None else Prediction(kl=kl, low=kl / 2, high=kl * 2, coverage=0.9, basis="sums")
    plan = by_hand.dropping().model_copy(update={"target": by_hand.plan(*by_hand.dropping().steps).target.model_copy(
        update={"preset": name, "share": None, "memory": size})})  # fmt: skip
    seen = None if measured is None else Measurement(kl=measured, low=measured * 0.9, high=float("nan"), tokens=700)
    return Candidate(plan, "drop", size, price, seen)


def test_points_say_what_the_planner_says(run: store.Run, tried: list[Candidate]) -> None:
    found = frames.points([frames.priced(run, tried)], budget=WHOLE // 2)
    assert len(found) == len(tried) >= 4
    assert found["bytes"].is_sorted()
    by_digest = {one.plan.digest: one for one in tried}
    for row in found.iter_rows(named=True):
        one = by_digest[row["digest"]]
        assert one.prediction is not None
        assert (row["kl"], row["low"], row["high"]) == (one.prediction.kl, one.prediction.low, one.prediction.high)
        assert (row["name"], row["mix"], row["bytes"]) == (one.name, one.mix, one.bytes)
        assert row["share"] == pytest.approx(one.bytes / WHOLE)
        saved = one.plan.estimate.bytes_saved
        assert row["bytes"] == pytest.approx(WHOLE - saved, abs=8)  # a budget without other weights counts experts
        assert row["bits"] == (16.0 if one.plan.estimate.bits is None else one.plan.estimate.bits)
        assert row["fits"] == (one.bytes <= WHOLE // 2)
        assert row["measured"] is None
    line = [one.plan.digest for one in curve.pareto(tried)]
    assert found.filter("pareto")["digest"].to_list() == line


def test_pareto_by_brute_force() -> None:
    rng = np.random.default_rng(3)
    sizes, costs = rng.integers(1, 9, 40), rng.integers(1, 9, 40) / 8
    frame = pl.DataFrame({"digest": [f"{n}" for n in range(40)], "bytes": sizes, "kl": costs})
    whole = frame.with_columns(pl.lit(None).cast(kind).alias(name) for name, kind in frames._POINTS.items()
                               if name not in frame.columns)  # fmt: skip
    found = frames.points([whole])
    for row in found.filter("pareto").iter_rows(named=True):
        assert not ((sizes <= row["bytes"]) & (costs < row["kl"])).any()
        assert not ((sizes < row["bytes"]) & (costs <= row["kl"])).any()
    reached = set(found.filter("pareto").select("bytes", "kl").rows())
    best = {(s, c) for s, c in zip(sizes.tolist(), costs.tolist(), strict=True)
            if not (((sizes <= s) & (costs < c)) | ((sizes < s) & (costs <= c))).any()}  # fmt: skip
    assert reached == best


def test_measurements_stand_beside_predictions(run: store.Run) -> None:
    one = candidate(100, 0.5)
    later = dataclasses.replace(one, measurement=Measurement(kl=0.7, low=0.6, high=float("nan"), tokens=90))
    found = frames.points([frames.priced(run, [one]), frames.priced(run, [later])])
    row = found.row(0, named=True)
    assert len(found) == 1
    assert (row["kl"], row["measured"], row["measured_low"], row["measured_high"]) == (0.5, 0.7, 0.6, None)
    assert row["measured_tokens"] == 90


def test_kept_documents_are_read_back(tmp_path: Path, run: store.Run, tried: list[Candidate]) -> None:
    path = tmp_path / "sample.duckdb"
    path.write_bytes(RUN.read_bytes())
    other = 1000
    kept = [dataclasses.replace(one, bytes=one.bytes + other) for one in tried]
    advice = Recommendation("apply", ("Because.",), tuple(kept), WHOLE // 2 + other, WHOLE + other)
    with store.open_run(path) as opened:
        store.write_plan(path, json.dumps(advice.content()), kind="recommendation")
        store.write_plan(path, json.dumps(curve_content(advice, kept)), kind="curve")
        store.write_plan(path, '{"kind": "recommendation"}', kind="recommendation", name="damaged")
        ((_, back),) = frames.recommended(opened, files=frames.files(opened, "recommendation"))
        assert frames.budget_of(opened, back) == WHOLE // 2
        assert [one.bytes for one in back.candidates] == [one.bytes for one in tried]  # experts alone
        sizes = frames.stored_curve(opened, files=frames.files(opened, "curve"))
        assert sizes.select("digest", "bytes", "kl").rows() == frames.priced(run, tried).select(
            "digest", "bytes", "kl").rows()  # fmt: skip
        store.write_plan(path, '{"candidates": [{"bytes": "many"}], "bytes_before": 1}', kind="curve", name="damaged")
        assert len(frames.stored_curve(opened, files=frames.files(opened, "curve"))) == len(tried)


def test_a_cheaper_plan_is_named_only_where_it_fits_and_is_clearly_cheaper(run: store.Run) -> None:
    plans = [candidate(100, 0.5, name="a"), candidate(80, 0.3, name="b"), candidate(200, 0.01, name="c")]
    found = frames.points([frames.priced(run, plans)], budget=150)
    best = frames.cheaper(found, 0.5)
    assert best is not None
    assert best["name"] == "b"
    assert frames.cheaper(found, 0.31) is None
    assert frames.cheaper(found, None) is None


def test_a_mixture_in_words(run: store.Run) -> None:
    assert frames.mixture(by_hand.dropping()) == "drop 4 of 8 experts"
    assert frames.mixture(by_hand.merging()) == "merge 8 experts into 4"
    assert frames.mixture(by_hand.slimming()) == "keep 91 % of the neurons"  # (0.25 + 7) / 8
    plan = planner.make(run, preset="budgeted_reap", share=0.25, memory=WHOLE // 4, quantizer="error_bits")
    assert (
        frames.mixture(plan)
        == f"drop 24 of 96 experts, then store what is left in {plan.estimate.bits:.3g} bits a weight"
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_curve_draws_predicted_and_measured(run: store.Run, theme: Any) -> None:
    plans = [
        candidate(3 * 2**20, 0.5, name="<b>a", measured=0.8),
        candidate(2**20, 2.0),
        candidate(2**21, 0.0, name="z"),
    ]
    found = frames.points([frames.priced(run, plans)], budget=2**21)
    chosen = plans[0].plan.digest
    figure = figures.cost_by_size(found, budget=2**21, chosen=chosen, theme=theme)
    traces = {trace.name: trace for trace in figure.data}
    hollow, filled = traces["drop"], traces["drop, measured"]
    assert hollow.marker.symbol == "circle-open"
    assert filled.marker.symbol == "circle"
    assert list(hollow.x) == [1.0, 2.0, 3.0]
    assert list(hollow.y) == [2.0, 1e-7, 0.5]  # a log axis has no zero
    assert (list(filled.x), list(filled.y)) == ([3.0], [0.8])
    assert list(filled.error_y.arrayminus) == pytest.approx([0.08])
    assert list(filled.error_y.array) == [0.0]
    assert hollow.marker.color == filled.marker.color
    assert hollow.customdata[2][0] == "&lt;b&gt;a"
    assert "0.25 to 1, 90% interval" in hollow.customdata[2][4]
    assert [one[6] for one in hollow.customdata] == ["not measured", "not measured", "measured 0.8"]
    assert list(traces["best of its size"].x) == [1.0, 2.0]
    assert list(traces["best for the budget"].x) == [3.0]
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.shapes[0].x0 == 2.0
    shown = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert shown == ["drop", "filled: measured", "best of its size", "best for the budget"]
    assert figure.layout.xaxis.title.text == "weights of all experts, MiB"


def test_a_curve_of_nothing_says_why(run: store.Run) -> None:
    found = frames.points([frames.priced(run, [candidate(1, None)])])
    assert "residual stream" in figures.cost_by_size(found).layout.annotations[0].text


def test_widths_are_those_of_the_plan() -> None:
    plan = quantizing({1: {0: {"gate": 4, "up": 4, "down": 2}, 1: {"gate": 1, "up": "ternary", "down": 8}}, 2: {}})
    found = bits.widths(plan)
    assert len(found) == 8
    rows = {(row["label"], row["expert"]): row for row in found.iter_rows(named=True)}
    assert [rows["1", 0][part] for part in PARTS] == ["4", "4", "2"]
    assert [rows["1", 1][part] for part in PARTS] == ["1", "ternary", "8"]
    assert [rows["2", 3][part] for part in PARTS] == ["as it is"] * 3
    assert bits.differing(found) == ["gate", "up", "down"]
    assert bits.differing(bits.widths(quantizing({1: {0: {"gate": 4, "up": 4, "down": 4}}, 2: {}}))) == ["gate"]
    assert bits.widths(by_hand.dropping()).is_empty()
    figure = bits_figures.bits_map(found, part="up", title="x")
    heat = figure.data[0]
    assert heat.z[0][:3].tolist() == [4.0, 1.0, 6.0]  # places among the widths, the narrowest first
    assert list(heat.text[0][:3]) == ["4", "t", "–"]
    assert heat.customdata[0][1] == "gate 1, up ternary, down 8"
    empty = bits_figures.bits_map(found.head(0), part="up", title="x")
    assert "no expert a width" in empty.layout.annotations[0].text


def test_the_histogram_counts_weights() -> None:
    plan = quantizing({1: {0: {"gate": 4, "up": 4, "down": 2}}, 2: {}})
    found = bits.histogram(plan)
    each = 32 * 32
    assert found.select("width", "experts", "projections", "weights").rows() == [
        ("2", 1, 1, each), ("4", 1, 2, 2 * each), ("as it is", 7, 21, 21 * each),
    ]  # fmt: skip
    assert found["share"].sum() == pytest.approx(1.0)
    assert list(bits_figures.histogram(found, title="x").data[0].y) == found["share"].to_list()


def test_experts_that_go_are_crossed_out(run: store.Run) -> None:
    plan = planner.make(run, preset="budgeted_reap", share=0.25, memory=WHOLE // 4, quantizer="error_bits")
    found = bits.widths(plan)
    assert found["gone"].sum() == 24
    assert found.filter("gone")["up"].null_count() == 24
    assert found.filter(~pl.col("gone"))["up"].null_count() == 0
    crosses = bits_figures.bits_map(found, part="up", title="x").data[1]
    assert (crosses.marker.symbol, len(crosses.x)) == ("x-thin", 24)


def test_cost_by_layer_adds_up_to_the_price(run: store.Run, tried: list[Candidate]) -> None:
    for one in tried:
        found = bits.turns(run, one.plan)
        assert one.prediction is not None
        assert found["kl"].sum() == pytest.approx(one.prediction.kl, rel=1e-4)
        happens = set(found.filter(pl.col("kl") > 0)["change"])
        assert happens == {{"quantize": "bits", "drop": "cut"}[step.step] for step in one.plan.steps}
    figure = bits_figures.cost_by_layer(found, title="x")
    assert figure.layout.barmode == "stack"
    assert sum(sum(trace.y) for trace in figure.data) == pytest.approx(found["kl"].sum())


def test_measured_factors_weigh_the_layers(run: store.Run, tried: list[Candidate]) -> None:
    plan = next(one.plan for one in tried if one.mix == "quantize")
    plain = bits.turns(run, plan)
    calibration = Calibration({(0, "bits"): 5.0}, typical=2.5, count=4, tokens=9)
    weighed = bits.turns(run, plan, calibration=json.dumps(calibration.content()))
    ratio = (weighed["kl"] / plain["kl"]).filter(plain["change"] == "bits")
    assert ratio.to_list() == pytest.approx([4.0] + [2.0] * 5)  # against the typical 1.25


def test_errors_of_an_expert_are_those_that_plans_are_priced_by(run: store.Run) -> None:
    found = expert_errors.errors(run, label="2", expert=5)
    known = layer_errors(Request(run=run, memory=0).task())[2, 0]
    assert found["width"].to_list() == [str(one) for one in BITS]
    for part, column in (("all", "whole"), ("gate", "gate"), ("up", "up"), ("down", "down")):
        expected = np.sqrt(known.errors[part][5] / known.energy[5])
        assert found[column].to_numpy() == pytest.approx(expected)
    whole = np.sqrt(known.errors["all"] / known.energy[:, None])
    assert found["median"].to_numpy() == pytest.approx(np.median(whole, axis=0))
    assert found["rank"].to_list() == ((whole > whole[5]).sum(axis=0) + 1).tolist()
    drawn = error_figures.errors_by_width(found, title="x")
    assert [len(trace.x) for trace in drawn.data] == [6] * 5
    assert drawn.layout.yaxis.type == "log"
    assert "No sampled token" in error_figures.errors_by_width(found.head(0), title="x").layout.annotations[0].text


def checked(**changes: Any) -> dict[str, Any]:
    """A self-check as ``moescope apply`` keeps it."""
    row = {"layer": 1, "expert": 0, "role": "routed", "part": "up", "bits": 4, "expected": 0.1, "low": 0.05,
           "high": 0.15, "found": 0.1, "verdict": "ok"}  # fmt: skip
    rows = [row, row | {"expert": 1, "found": 0.14}, row | {"expert": 2, "found": 0.06, "verdict": "too wide"}]
    logits = {"tokens": 64, "largest": 0.1, "relative": 1e-3, "kl": 1e-6, "moved": 0.2, "meant": 0.2}
    content = {"weights": {"rows": rows, "missing": [], "passed": True}, "logits": logits, "failure": "",
               "passed": True, "not_checked": ["keys: it is said elsewhere"],
               "missing": [], "unexpected": [], "mismatched": [],
               "routing": [{"layer": 1, "step": 0, "tokens": 64, "flips": 0.25, "kl": None}]}  # fmt: skip
    return content | changes


def test_a_self_check_in_words_and_rows() -> None:
    passed, words = checks.verdict(checked())
    assert passed is True
    assert "3 matrices" in words
    assert "25.0% of the routers' selections" in words
    assert "keys: it is said elsewhere" in words
    assert checks.worst(checked())["expert"].to_list() == [2, 1, 0]  # wrong ones, then by how near to an end
    assert checks.flips(checked())["flips"].to_list() == [0.25]
    assert checks.verdict(checked(passed=False, failure="it lacks a key"))[0] is False
    nothing = checked(weights=None, logits=None, routing=None)
    assert checks.verdict(nothing)[0] is None
    assert checks.worst(nothing).is_empty()
    with pytest.raises(StoreError, match="damaged"):
        checks.verdict({"weights": None})
    with pytest.raises(StoreError, match="damaged"):
        checks.worst({"weights": {"rows": [{"layer": 1}]}})
