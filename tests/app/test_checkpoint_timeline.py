"""Checkpoints in order: measures of collapse against loops, thresholds, alerts, order, the page and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from streamlit.testing.v1 import AppTest
from visiting import visited

import store
from app.cli import main
from app.exhibits import timeline as exhibits
from app.exhibits.exhibit import Absent, fresh
from app.figures import timeline as figures
from app.frames import timeline
from app.frames.load import NEARLY_DEAD
from app.frames.timeline_measures import MEASURES, collapse, expected_nearly_dead, shares
from app.frames.timeline_order import alike, ordered, short_names, step_of
from moescope.errors import InputError
from store import LayerInfo, RunInfo, RunWriter

EXPERTS, TOP_K, TOKENS = 8, 2, 4000
NAMES = ("train-500", "train-1500", "train-20k")
EVEN = [TOKENS * TOP_K // EXPERTS] * EXPERTS
COLLAPSED = [4000, 3990, 5, 5, 0, 0, 0, 0]
SKEWED = [4000, 1000, 1000, 1000, 1000, 0, 0, 0]


def write(
    folder: Path, name: str, loads: dict[int, list[int]], *, probability: bool = True, corpus: str = "x",
    tokens: int = TOKENS,
) -> Path:  # fmt: skip
    """A run of statistics alone: selections per expert by layer; probability follows load."""
    writer = RunWriter.create(folder, name, RunInfo(model="m", num_layers=4, settings={"corpus_sha256": corpus}))
    layers = [LayerInfo(layer=layer, num_experts=len(load), top_k=TOP_K) for layer, load in loads.items()]
    rows = [
        {"layer": layer, "step": 0, "expert": expert, "kind": "routed", "domain": domain, "phase": "prompt",
         "tokens": count // 2 if domain == "a" else count - count // 2,
         "probability_sum": count / TOP_K / 2 if probability else None}
        for layer, load in loads.items() for expert, count in enumerate(load) for domain in "ab"
    ]  # fmt: skip
    router = [
        {"layer": layer, "step": 0, "domain": domain, "phase": "prompt", "tokens": tokens // 2,
         "selections": tokens * TOP_K // 2, "logit_tokens": tokens // 2 if probability else 0,
         "entropy_sum": 1.5 * tokens / 2, "top_probability_sum": 0.4 * tokens / 2}
        for layer in loads for domain in "ab"
    ]  # fmt: skip
    writer.write_shard(
        {"layer": pl.DataFrame([vars(layer) for layer in layers]), "expert_load": pl.DataFrame(rows),
         "router_load": pl.DataFrame(router)}
    )  # fmt: skip
    return writer.finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 collapses from the second checkpoint on; layer 2 is uneven in the second alone."""
    place = tmp_path_factory.mktemp("checkpoints")
    write(place, NAMES[2], {1: COLLAPSED, 2: EVEN})
    write(place, NAMES[0], {1: EVEN, 2: EVEN})
    write(place, NAMES[1], {1: COLLAPSED, 2: SKEWED})
    write(place, "other", {1: EVEN, 2: EVEN}, probability=False, corpus="y")
    write(place, "narrow", {1: EVEN[:4]})
    return place


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[store.Run]:
    return [store.open_run(folder / f"{name}.duckdb") for name in NAMES]


def test_measures_equal_loops(runs: list[store.Run]) -> None:
    found = {(row["label"], row["measure"]): row for row in collapse(runs[1]).iter_rows(named=True)}
    for label, load in (("1", COLLAPSED), ("2", SKEWED)):
        mean = sum(load) / EXPERTS
        f, p = [count / sum(load) for count in load], [count / sum(load) for count in load]
        assert found[label, "dead"]["value"] == load.count(0)
        assert found[label, "nearly_dead"]["value"] == sum(0 < count < 0.05 * mean for count in load)
        assert found[label, "max_violation"]["value"] == pytest.approx(max(load) / mean - 1)
        entropy = -sum(one * math.log(one) for one in f if one)
        assert found[label, "normalised_entropy"]["value"] == pytest.approx(entropy / math.log(EXPERTS))
        loss = EXPERTS * sum(one * other for one, other in zip(f, p, strict=True))
        assert found[label, "balance_loss"]["value"] == pytest.approx(loss)
        assert found[label, "correlation"]["value"] == pytest.approx(1.0)
        assert found[label, "router_entropy"]["value"] == pytest.approx(1.5 / math.log(EXPERTS))
        assert found[label, "top_probability"]["value"] == pytest.approx(0.4)
    over = {name for (label, name), row in found.items() if label == "1" and row["over"]}
    assert over == {"dead", "nearly_dead", "balance_loss", "normalised_entropy"}
    limit = math.log(1.25 * TOP_K) / math.log(EXPERTS)
    assert found["1", "normalised_entropy"]["threshold"] == pytest.approx(limit)


def test_few_tokens_are_not_blamed_on_the_router(tmp_path: Path) -> None:
    experts, tokens = 64, 100
    load = np.bincount(np.random.default_rng(3).integers(0, experts, tokens * TOP_K), minlength=experts)
    write(tmp_path, "short", {1: load.tolist()}, tokens=tokens)
    with store.open_run(tmp_path / "short.duckdb") as run:
        found = {row["measure"]: row for row in collapse(run).iter_rows(named=True)}
    assert found["dead"]["value"] == (load == 0).sum() > 0 and not found["dead"]["over"]
    assert not found["nearly_dead"]["over"]
    drawn = np.random.default_rng(0).binomial(tokens, TOP_K / experts, (4000, experts))
    by_chance = (drawn < NEARLY_DEAD * tokens * TOP_K / experts).sum(1).mean()
    assert expected_nearly_dead(experts, TOP_K, tokens) == pytest.approx(by_chance, rel=0.05)


def test_runs_without_probabilities_say_less(folder: Path) -> None:
    with store.open_run(folder / "other.duckdb") as run:
        found = dict(collapse(run).filter(label="1").select("measure", "value").iter_rows())
        assert found["balance_loss"] is None and found["router_entropy"] is None
        assert found["max_violation"] == 0
        assert shares(run, label="2")["probability"].is_null().all()
        assert shares(run, label="2")["load"].to_list() == [1.0] * EXPERTS


def test_summary_and_alerts(runs: list[store.Run]) -> None:
    frame = timeline.over_checkpoints(runs)
    summed = {(row["measure"], row["place"]): row for row in timeline.summary(frame).iter_rows(named=True)}
    assert (summed["max_violation", 1]["worst"], summed["max_violation", 1]["worst_label"]) == (3.0, "1")
    values = [3.0, 3.0]
    assert summed["max_violation", 1]["near"] == pytest.approx(np.percentile(values, 90))
    low = frame.filter(measure="normalised_entropy", place=2)["value"]
    assert summed["normalised_entropy", 2]["worst"] == low.min()
    assert summed["normalised_entropy", 2]["near"] == pytest.approx(np.percentile(low.to_numpy(), 10))
    assert summed["normalised_entropy", 0]["over"] == 0 and summed["normalised_entropy", 2]["over"] == 1
    found = {(row["measure"], row["label"]): row for row in timeline.alerts(frame).iter_rows(named=True)}
    stands = found["dead", "1"]
    assert (stands["since"], stands["until"], stands["stands"], stands["value"]) == ("1500", "20k", True, 4)
    assert stands["detail"] == "Layer 1: 4 dead experts at 20k; since 1500."
    gone = found["dead", "2"]
    assert not gone["stands"] and gone["detail"] == "Layer 2: 3 dead experts at 1500; no longer after it."
    loss = found["balance_loss", "1"]
    assert loss["excess"] == pytest.approx((loss["value"] - 2) / 2)
    assert f"{loss['value'] / 2:.2f} times its threshold of 2" in loss["detail"]
    assert "max_violation" not in {measure for measure, _ in found}  # 3.0 is at the threshold, not over it
    always = timeline.alerts(timeline.over_checkpoints(runs[1:]))
    assert "from the first checkpoint on" in always.filter(measure="dead", label="1")["detail"][0]
    assert timeline.texts(runs) == 1


def test_other_shapes_are_refused(runs: list[store.Run], folder: Path) -> None:
    with (
        store.open_run(folder / "narrow.duckdb") as narrow,
        pytest.raises(InputError, match="'narrow' has other MoE layers"),
    ):
        timeline.over_checkpoints([narrow, *runs])


def test_order_and_names() -> None:
    assert [step_of(name) for name in ("a-step20k", "x7-checkpoint-500", "m_b_30", "v2.iter_1.5M", "final")] == [
        20_000, 500, 30, 1.5e6, math.inf,
    ]  # fmt: skip
    names = ["run-step10", "run-final", "run-step9"]
    assert [names[place] for place in ordered(names, [3, 1, 2], "step")] == ["run-step9", "run-step10", "run-final"]
    assert ordered(names, [3, 1, 2], "date") == [1, 2, 0]
    dated = ["m-2024-02-01", "m-2024-01-15", "m-2023-12-31"]
    assert ordered(dated, [0, 0, 0], "step") == [2, 1, 0] and step_of("m-step7-2024-02-01") == 7
    assert ordered(names, [3, 1, 2], "chosen") == [0, 1, 2]
    assert short_names(["qwen-step-10", "qwen-step-9"]) == ["10", "9"]
    assert short_names(["a", "b"]) == ["a", "b"] and short_names(["a", "a-b"]) == ["a", "a-b"]
    assert alike("t-5", ["t-5", "t-20k", "u-5", "t-5-x"]) == ["t-5", "t-20k"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_draw_what_the_frames_hold(theme: Any, runs: list[store.Run]) -> None:
    frame = timeline.over_checkpoints(runs)
    summed = timeline.summary(frame)
    drawn = figures.lines(summed, frame, measure="normalised_entropy", label="2", theme=theme)
    curves = {trace.name: list(trace.y) for trace in drawn.data}
    assert curves["lowest layer"] == summed.filter(measure="normalised_entropy")["worst"].to_list()
    assert curves["layer 2"] == frame.filter(measure="normalised_entropy", label="2")["value"].to_list()
    assert set(curves["threshold"]) == {frame.filter(measure="normalised_entropy")["threshold"][0]}
    cells = figures.layer_map(frame, measure="dead", theme=theme)
    np.testing.assert_array_equal(cells.data[0].z, [[0, 4, 4], [0, 3, 0]])
    assert list(zip(cells.data[1].x, cells.data[1].y, strict=True)) == [("1500", "1"), ("1500", "2"), ("20k", "1")]
    assert cells.layout.yaxis.autorange == "reversed" and cells.layout.meta["pick"] == {"layer": "y"}
    made = exhibits.load_and_probability(runs[1], theme=theme, layer="1")
    np.testing.assert_allclose(made.figure.data[1].y, np.array(COLLAPSED) * EXPERTS / 8000)
    for measure in MEASURES:
        figures.lines(summed, frame, measure=measure, theme=theme)


def test_exhibits_take_other_checkpoints_by_name(runs: list[store.Run]) -> None:
    made = exhibits.over_time(runs[0], others="train-20k, train-1500")
    assert made.frame["checkpoint"].to_list() == ["500", "1500", "20k"]
    with pytest.raises(Absent, match="several checkpoints"):
        exhibits.over_time(runs[0])
    with pytest.raises(Absent, match="'train-1500' has no tokens|no trace"):
        exhibits.by_layer(runs[0], others="train-1500,train-20k", measure="agreement")
    with pytest.raises(InputError, match="no measure 'mean'"):
        exhibits.by_layer(runs[0], others="train-1500", measure="mean")
    assert exhibits.checkpoints(runs[0], fresh, "train-20k,train-500", order="chosen").paths[0].endswith("20k.duckdb")


def page(monkeypatch: pytest.MonkeyPatch, folder: Path, **parameters: Any) -> AppTest:
    app = visited(monkeypatch, folder, "compare", **parameters)
    return app.button_group(key="section").set_value("Timeline").run()


def test_the_page_takes_runs_named_alike(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = page(monkeypatch, folder, run="train-1500")
    app.selectbox(key="measure").select("dead").run()
    assert not app.exception and not app.error
    titles = [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]
    assert titles[:2] == ["Dead experts", "Dead experts by layer"]
    assert titles[2].startswith("Load against probability, layer 1, train-20k")
    assert "Layer 1\\: 4 dead experts at 20k; since 1500\\." in app.warning[0].value
    app.multiselect(key="checkpoints").set_value(["train-500", "other"]).run()
    assert not app.exception
    assert any("2 different texts" in caption.value for caption in app.caption)
    app.selectbox(key="measure").select("agreement").run()
    assert not app.exception and any("no trace" in info.value for info in app.info)
    app.multiselect(key="checkpoints").set_value(["narrow"]).run()
    assert not app.exception and any("other MoE layers" in info.value for info in app.info)


def test_the_page_asks_for_checkpoints(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    app = page(monkeypatch, folder, run="other", checkpoints=["../x"], order="<b>")
    assert not app.exception
    assert any("several checkpoints" in info.value for info in app.info)


def test_the_command_prints_alerts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["compare", "train-20k", "train-500", "train-1500", "--store", str(folder), "--order", "step"]
    assert main(told) == 0
    printed = capsys.readouterr().out
    assert "Layer 1: 4 dead experts at 20k; since 1500." in printed
    assert "No agreement with the last checkpoint" in printed
    assert main([*told, "--fail-on-alert", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["checkpoint"] for row in found["timeline"][:3]] == ["500", "1500", "20k"]
    assert found["alerts"][0]["detail"].startswith("Layer 1")
    assert main(["compare", "train-500", "train-500", "train-500", "--store", str(folder), "--fail-on-alert"]) == 0
    capsys.readouterr()
    assert main(["compare", "narrow", "train-500", "train-1500", "--store", str(folder)]) == 2
    assert "has other MoE layers" in capsys.readouterr().err


def test_what_a_timeline_rests_on_is_counted_in_words(runs: list[store.Run]) -> None:
    frame = timeline.over_checkpoints(runs)
    one = frame.filter(label=frame["label"][0])
    assert exhibits._layers(one) == f"{len(runs)} checkpoints, 1 layer."
    assert exhibits._layers(frame) == f"{len(runs)} checkpoints, {frame['label'].n_unique()} layers."
