"""The advice on the page Compress: a budget in the address, kept recommendations, jobs, exports and self-checks."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

import planner
import store
from app import jobs
from app.frames import compress_curve as frames
from app.frames import compress_presets as presets
from moescope.errors import StoreError
from planner import advice, curve
from planner.estimate.prediction import Calibration
from planner.finalists import Measurement
from planner.presets import DEFAULT, PRESETS
from planner.recommendation import Recommendation
from sample_data import MODEL, RUN

WHOLE = 96 * 3 * 128 * 128 * 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run."""
    folder = tmp_path_factory.mktemp("store")
    for source in RUN.parent.glob("sample*.duckdb"):
        shutil.copyfile(source, folder / source.name)
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Little enough to be quick, and nothing beside the run."""
    monkeypatch.setattr(
        presets, "PRESETS", tuple(preset for preset in PRESETS if preset.name in (DEFAULT, "frequency"))
    )
    monkeypatch.setattr(curve, "QUICK_PRESETS", ("error_bits", "budgeted_reap"))
    monkeypatch.setattr(advice, "QUICK_ELSEWHERE", 1)
    monkeypatch.setattr(frames, "QUICK_SIZES", (0.3,))
    for name in ("sample.plans", "sample.evaluations"):
        shutil.rmtree(directory / name, ignore_errors=True)


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str) -> AppTest:
    return visited(monkeypatch, directory, "compress", **parameters)


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.success, app.caption, app.subheader, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def chart(app: AppTest, title: str) -> dict[str, Any]:
    found = [json.loads(one.proto.spec) for one in app.get("plotly_chart")]
    return next(one for one in found if one["layout"]["title"]["text"].startswith(title))


def metric(app: AppTest, label: str) -> tuple[str, str]:
    return next((one.value, one.delta) for one in app.metric if one.label == label)


def press(app: AppTest, label: str) -> None:
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception, app.exception[0].message


def kept(run: store.Run, *, share: float, measured: float | None, verdict: Any = "apply") -> Recommendation:
    """A recommendation as ``moescope recommend`` keeps it, whose first plan was measured."""
    found = planner.recommend(run, memory=int(WHOLE * share), quick=True)
    first = found.candidates[0]
    seen = None if measured is None else Measurement(kl=measured, low=measured * 0.9, high=measured * 1.1, tokens=4321)
    first = replace(first, measurement=seen, risks=("<b>A risk</b> of it.",))
    calibration = Calibration(typical=2.5, spread=0.2, count=7, tokens=4321) if measured is not None else Calibration()
    return replace(found, verdict=verdict, candidates=(first, *found.candidates[1:]), calibration=calibration)


def test_a_budget_in_the_address_is_advised_on(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, budget="40")
    with store.open_run(directory / "sample.duckdb") as run:
        found = frames.advice(run, memory=int(WHOLE * 0.4), guard=True)
    best, price = found.candidates[0], found.candidates[0].prediction
    assert price is not None
    assert metric(app, "Budget")[0] == "3.6 MiB"
    assert metric(app, "Predicted KL") == (f"{price.kl:.3g}", f"{price.low:.2g} to {price.high:.2g}")
    assert metric(app, "Measured KL") == ("–", "not measured")
    text = words(app)
    assert "Store the experts in" in text
    assert found.reasons[0] in text
    assert "no plan was measured for them" in text
    shapes = chart(app, "Size against")["layout"]["shapes"]
    assert shapes[0]["x0"] == pytest.approx(3.6, abs=1e-3)
    table = next(one.value for one in app.dataframe if "elsewhere" in one.value.columns)
    assert table["name"].to_list() == [one.name for one in found.candidates]
    app.button_group(key="section").set_value("Plan").run()
    assert chart(app, "Bits of")["data"][0]["type"] == "heatmap"
    app.button_group(key="section").set_value("Apply").run()
    assert best.plan.digest[:12] in words(app)  # the plan is the one that is advised
    assert f"--preset {best.plan.target.preset} --memory {int(WHOLE * 0.4)}" in words(app)


def test_a_kept_recommendation_stands_with_what_was_measured(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    path = directory / "sample.duckdb"
    with store.open_run(path) as run:
        found = kept(run, share=0.5, measured=0.0123, verdict="leave it")
    store.write_plan(path, json.dumps(found.content()), kind="recommendation", name="kept")
    app = visit(monkeypatch, directory, budget="50")
    assert metric(app, "Measured KL") == ("0.0123", "0.011 to 0.014")
    assert "\\<b\\>A risk" in "\n".join(one.value for one in app.markdown)
    filled = [trace for trace in chart(app, "Size against")["data"] if trace["name"] == "quantize, measured"]
    assert len(filled) == 1
    other = visit(monkeypatch, directory, budget="30")
    assert metric(other, "Measured KL")[1] == "not measured"
    assert metric(other, "Budget")[0] == "2.7 MiB"
    other.button_group(key="section").set_value("Plan").run()
    assert "corrected by measured plans" in words(other)  # what was measured once holds for other budgets
    other.selectbox(key="advice").select("recommendation-kept.json").run()
    assert not other.exception
    assert metric(other, "Measured KL")[0] == "0.0123"
    assert metric(other, "Budget")[0] == "4.5 MiB"


def test_all_methods_are_priced_in_the_background(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    started: list[tuple[Path, dict[str, Any]]] = []

    def recommend(run: Path, **what: Any) -> Any:
        started.append((run, what))
        raise StoreError("no room")

    monkeypatch.setattr(jobs, "recommend", recommend)
    app = visit(monkeypatch, directory, budget="40", guard="false")
    press(app, "Price all methods")
    ((run, what),) = started
    assert run == directory / "sample.duckdb"
    assert (what["memory"], what["curve"], what["options"]) == (int(WHOLE * 0.4), True, ["--no-guard"])
    assert "no room" in words(app)
    press(app, "Measure finalists")
    assert "where is the checkpoint" in words(app)
    app.text_input(key="measure-source").input(str(MODEL))
    press(app, "Measure finalists")
    assert "Plans are measured on text" in words(app)
    app.text_area(key="measure-texts").input(str(MODEL / "config.json"))
    press(app, "Measure finalists")
    what = started[1][1]
    weights = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    assert 0 < what["memory"] - int(WHOLE * 0.4) < weights - WHOLE  # the budget counts the other weights too
    assert (what["source"], what["texts"]) == (MODEL, [str(MODEL / "config.json")])


def test_a_job_without_a_plan(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "sample.duckdb"
    job = jobs.recommend(path, memory=WHOLE, title="all <b>methods", options=["--engine", "any"])
    assert job.commands == (("recommend", str(path), "--memory", str(WHOLE), "--engine", "any"),)
    (read,) = jobs.jobs(path)
    assert (read.title, read.plan, read.destination) == ("all <b>methods", "", "")
    end = time.monotonic() + 100
    while jobs.status(job).state == "running" and time.monotonic() < end:
        time.sleep(0.1)
    assert jobs.status(job).state == "done", jobs.status(job).log  # everything fits
    app = visit(monkeypatch, directory)
    assert "all \\<b\\>methods" in "\n".join(one.value for one in app.markdown)


def test_files_for_other_engines(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, budget="40", section="Apply")
    text = words(app)
    assert "GPTQModel" in text or any("GPTQModel" in one.label for one in app.get("download_button"))
    plan = visit(monkeypatch, directory, budget="40", plan="of a preset", section="Apply")
    assert "Files for other engines, which quantize by themselves" not in [one.label for one in plan.expander]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({}, "is what the plan says"), ({"passed": False, "failure": "it lacks <b>keys"}, "is not what the plan says")],
)
def test_the_self_check_of_an_applied_plan(
    monkeypatch: pytest.MonkeyPatch, directory: Path, changes: dict[str, Any], sentence: str
) -> None:
    path = directory / "sample.duckdb"
    with store.open_run(path) as run:
        plan = frames.advice(run, memory=int(WHOLE * 0.4), guard=True)[0]
    content = {"weights": {"rows": []}, "logits": None, "failure": "", "passed": True, "not_checked": ["logits: few"],
               "routing": [{"layer": 0, "step": 0, "tokens": 64, "flips": 0.5, "kl": 0.1}]}  # fmt: skip
    store.write_plan(path, json.dumps(content | changes), kind="check", name=plan.digest[:12])
    app = visit(monkeypatch, directory, budget="40", section="Measured")
    assert sentence in words(app)
    assert any("flips" in one.value.columns for one in app.dataframe)
    store.write_plan(path, '{"weights": 3}', kind="check", name=plan.digest[:12])
    assert "a self-check is damaged" in words(visit(monkeypatch, directory, budget="40", section="Measured"))


def test_a_run_that_cannot_be_priced_still_shows_presets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, activations=False)
    app = visit(monkeypatch, tmp_path)
    assert "needs the level activations" in words(app) or "Nothing can be advised" in words(app)
    app.button_group(key="plan").set_value("preset").run()
    app.button_group(key="section").set_value("Apply").run()
    assert not app.exception
    assert "--preset frequency" in words(app)
