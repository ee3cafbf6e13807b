"""The page Compress: the plan at once, presets beside each other, jobs, what was measured, and every empty case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import by_hand
import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

import planner
import store
from app import jobs
from app.figures import compress as figures
from app.figures import compress_measured as measured_figures
from app.figures.room import influence
from app.figures.room import width as neurons
from app.frames import compress as frames
from app.frames import compress_curve, evaluation, room
from app.frames import compress_measured as measured
from app.frames import compress_presets as presets
from compressor.plan import Plan
from planner import advice, curve
from planner.presets import DEFAULT, PRESETS
from sample_data import MODEL, RUN

MEASURES = (*("repeated_4grams", "longest_loop", "distinct_1", "distinct_2", "entropy", "length", "base_loss"),)
SIZE = dict.fromkeys(
    ("file_bytes", "memory_bytes", "parameters", "active_parameters", "expert_parameters", "experts"), 1000
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run."""
    folder = tmp_path_factory.mktemp("store")
    for source in RUN.parent.glob("sample*.duckdb"):
        shutil.copyfile(source, folder / source.name)
    return folder


@pytest.fixture(autouse=True)
def few_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of each kind, so that pages are quick; tests of the command go through all."""
    names = (DEFAULT, "reap", "ean", "frequency", "copies", "camera_p", "heapr")
    monkeypatch.setattr(presets, "PRESETS", tuple(preset for preset in PRESETS if preset.name in names))
    monkeypatch.setattr(curve, "QUICK_PRESETS", ("error_bits", "budgeted_reap"))
    monkeypatch.setattr(advice, "QUICK_ELSEWHERE", 1)
    monkeypatch.setattr(compress_curve, "QUICK_SIZES", (0.3,))


@pytest.fixture
def clean(directory: Path) -> Path:
    """The same without plans and evaluations."""
    for name in ("sample.plans", "sample.evaluations"):
        shutil.rmtree(directory / name, ignore_errors=True)
    return directory


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str | list[str]) -> AppTest:
    return visited(monkeypatch, directory, "compress", **({"plan": "of a preset", "section": "Plan"} | parameters))


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.success, app.caption, app.subheader, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def turn(app: AppTest, section: str) -> str:
    """Open a section; the words on the page then."""
    app.button_group(key="section").set_value(section).run()
    assert not app.exception, app.exception[0].message
    return words(app)


def charts(app: AppTest) -> list[dict[str, Any]]:
    """The figures of a plan and of measurements: those of the advice are tested in test_compress_advice."""
    found = [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]
    left_out = ("Size against predicted cost, every plan", "Where the predicted cost comes from")
    return [one for one in found if one["layout"]["title"]["text"] not in left_out]


def titles(app: AppTest) -> list[str]:
    return [one["layout"]["title"]["text"] for one in charts(app)]


def metrics(app: AppTest) -> dict[str, tuple[str, str]]:
    return {one.label: (one.value, one.delta) for one in app.metric}


def press(app: AppTest, label: str) -> None:
    next(button for button in app.button if button.label == label).click().run()
    assert not app.exception, app.exception[0].message


def document(plan: str | None, **changes: Any) -> dict[str, Any]:
    """An evaluation as ``moescope evaluate`` keeps it."""
    one = {"value": 1.2, "low": 1.1, "high": 1.3}
    part = {"kl": {"value": 0.5, "low": 0.4, "high": None}, "agreement": one, "ratio": one, "tokens": 700}
    probe = {"name": "copying", "asks": "What came before?", "items": 30, "enough": False, "accuracy": one,
             "base_accuracy": one, "difference": one}  # fmt: skip
    generation = {"prompts": 4, "common": one, "identical": one, "per_domain": {},
                  "measures": dict.fromkeys(MEASURES, {"model": one, "base": one, "difference": one})}  # fmt: skip
    side = {**one, "tokens": 700, "per_domain": {"c": one}}
    content = {
        "kind": "evaluation", "version": 1, "model": {"name": "smaller"}, "base": {"name": "model"}, "data": {"n": 1},
        "plan": plan, "held_out": True, "divergence": {**part, "per_domain": {"c": part}},
        "perplexity": {"model": side, "base": side, "ratio": one}, "routing": None, "generation": generation,
        "probes": [probe], "size": {"model": SIZE, "base": SIZE}, "speed": None, "lm_eval": None,
        "notes": ["A note on it."], "verdict": "Perplexity has risen.",
    }  # fmt: skip
    return content | changes


def test_the_plan_stands_there_at_once(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    app = visit(monkeypatch, clean)
    with store.open_run(clean / "sample.duckdb") as run:
        plan = planner.make(run, share=0.25)
    assert titles(app) == [f"What becomes of every expert: {DEFAULT}, 25 %, per_layer"]
    assert metrics(app)["Experts"] == ("72", "-25.0% of 96")
    assert metrics(app)["Experts take"] == ("6.75 MiB", "-25.0% of 9 MiB")
    assert metrics(app)["Active"][1] == "unchanged"
    assert metrics(app)["Predicted error"][0] == f"{plan.estimate.weighed_error:.3g}"
    price = plan.estimate.prediction
    assert price is not None
    assert metrics(app)["Predicted KL"] == (f"{price.kl:.3g}", f"{price.low:.2g} to {price.high:.2g}")
    assert "108,000 tokens" in words(app)
    units = next(one.value for one in app.dataframe if "fate" in one.value.columns)  # of the layer in focus: the first
    expected = frames.units(plan).filter(label="0")
    assert units["fate"].to_list() == expected["fate"].to_list() and len(units) == 16
    assert "HEAPr" in turn(app, "Presets")  # what this run cannot give
    assert titles(app) == ["Predicted error by preset"]
    text = turn(app, "Apply")
    assert plan.digest[:12] in text
    assert f"--preset {DEFAULT} --share 0.25 -o plan.json" in text
    assert "has not been measured yet" in turn(app, "Measured")


def test_room_to_cut_stands_by_layer_and_domain(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    app = visit(monkeypatch, clean, section="Room")
    assert titles(app) == ["Influence of each layer's experts", "How much of a layer its strongest neurons hold"]
    with store.open_run(clean / "sample.duckdb") as run:
        depth, width = room.depth(run), room.width(run)
        plain, sums = run.table("moe_output"), run.table("neuron_activation")
    assert depth.shape == (6 * 7, 6) and width["domain"].unique().to_list() == [room.ALL]
    for row in depth.iter_rows(named=True):
        own = plain.filter((pl.col("layer") == row["layer"]) & (pl.col("domain") == row["domain"]))
        assert row["moe_influence"] == pytest.approx(1 - own["cosine_sum"].sum() / own["residual_tokens"].sum())
    assert (width["quarter"] >= 0.25).all() and (width["half"] >= width["quarter"]).all() and len(sums)
    assert influence(depth).data[0].z.shape == (6, 7)
    assert neurons(width).data[0].z.shape == (6, 3)


def test_a_link_restores_the_choice(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    app = visit(
        monkeypatch, clean, preset="CAMERA-P", share="40", domains=["c", "german"], guard="false", form="default"
    )
    assert titles(app)[:2] == [
        "What becomes of every expert: camera_p, 40 %, masked", "Neurons that stay: camera_p, 40 %, masked",
    ]  # fmt: skip
    with store.open_run(clean / "sample.duckdb") as run:
        plan = planner.make(run, preset="camera_p", share=0.4, domains=["c", "german"], guard=False)
    assert "Predicted error" not in metrics(app)  # a plan that slims has a price, and no such error
    assert plan.estimate.prediction is not None
    assert metrics(app)["Predicted KL"][0] == f"{plan.estimate.prediction.kl:.3g}"
    text = turn(app, "Apply")
    assert "--preset camera_p --share 0.4 --domains c,german --no-guard" in text
    assert plan.digest[:12] in text


def test_bad_values_in_a_link_fall_back(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    app = visit(monkeypatch, clean, preset="nothing", share="0", domains="klingon", by="weight", memory="-3")
    assert f"--preset {DEFAULT} --share 0.25 -o plan.json" in turn(app, "Apply")


def test_a_budget_in_bytes(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    app = visit(monkeypatch, clean, by="memory", preset="REAP")
    assert metrics(app)["Experts"][0] == "72"
    app.number_input(key="memory").set_value(1e-6).run()
    assert "No such plan" in words(app)
    assert "fits into" in words(app)
    assert not app.exception


def test_forms_that_stock_engines_do_not_load(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    app = visit(monkeypatch, clean, preset="Copies", section="Apply")
    app.selectbox(key="form").select("per_layer").run()
    assert not app.exception
    assert "--form per_layer" in words(app) or "No such plan" in words(app)
    app.selectbox(key="form").select("padded").run()
    assert "without a bias" in words(app)
    assert "merge or slim" in turn(app, "Presets")  # the others stand all the same
    assert any("refused" in one.value.columns for one in app.dataframe)


def test_a_plan_is_kept_once(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    app = visit(monkeypatch, clean, preset="REAP", section="Apply")
    press(app, "Keep beside the run")
    press(app, "Keep beside the run")
    (path,) = store.list_plans(clean / "sample.duckdb")
    assert Plan.load(path).target.preset == "reap"


def test_typed_paths_are_checked_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, clean: Path, tmp_path: Path
) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(jobs, "start", lambda run, **what: started.append(what))
    app = visit(monkeypatch, clean, preset="REAP", section="Apply")
    (tmp_path / "empty").mkdir()
    for source, destination, texts, message in (
        ("", str(tmp_path / "out"), "", "where is the checkpoint"),
        ("--help", str(tmp_path / "out"), "", "no folder of a checkpoint"),
        (str(tmp_path / "empty"), str(tmp_path / "out"), "", "it has no config"),
        (str(MODEL), str(tmp_path / "empty"), "", "exists already"),
        (str(MODEL), str(tmp_path / "a" / "b"), "", "is no folder"),
        (str(MODEL), str(tmp_path / "out"), "--tokens\n5", "no text at"),
    ):
        app.text_input(key="apply-source").input(source)
        app.text_input(key="apply-destination").input(destination)
        app.text_area(key="apply-texts").input(texts)
        press(app, "Apply")
        assert message in words(app).replace("\\", ""), message
    assert started == []
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_refused() -> None:
    from app.job_paths import checked_source
    from moescope.errors import InputError

    with pytest.raises(InputError, match="the plan is for toy"):
        checked_source(by_hand.dropping(), str(MODEL))
    other = by_hand.source(layers=(1, 2)).model_copy(update={"model_type": "olmoe"})
    with pytest.raises(InputError, match="decoder layers, the plan is for 3"):
        checked_source(by_hand.dropping(source=other), str(MODEL))


def test_texts_may_be_labelled(tmp_path: Path) -> None:
    from app.job_paths import checked_texts

    (tmp_path / "a.txt").touch()
    (tmp_path / "b=c.txt").touch()
    typed = f"\n {tmp_path}/a.txt\ncode={tmp_path}/a.txt\n{tmp_path}/b=c.txt\n"
    assert checked_texts(typed) == [f"{tmp_path}/a.txt", f"code={tmp_path}/a.txt", f"{tmp_path}/b=c.txt"]


def test_a_job_runs_and_its_end_is_shown(monkeypatch: pytest.MonkeyPatch, clean: Path, tmp_path: Path) -> None:
    import time

    app = visit(monkeypatch, clean, preset="REAP", section="Apply")
    app.text_input(key="apply-source").input(str(MODEL))
    app.text_input(key="apply-destination").input(str(tmp_path / "out"))
    press(app, "Apply")
    assert "Started, process" in words(app)
    (job,) = jobs.jobs(clean / "sample.duckdb")
    end = time.monotonic() + 120
    while jobs.status(job).state == "running" and time.monotonic() < end:
        time.sleep(0.1)
    assert jobs.status(job).state == "done", jobs.status(job).log
    text = words(visit(monkeypatch, clean))  # another tab, another plan
    assert str(tmp_path / "out") in text
    assert "done" in text
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_was_measured_stands_beside_the_original(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    run = clean / "sample.duckdb"
    with store.open_run(run) as opened:
        plans = [planner.make(opened, preset=preset, share=0.25) for preset in ("reap", "frequency")]
    for plan in plans:
        store.write_plan(run, plan.text())
        store.write_evaluation(run, document(plan.digest, model={"name": plan.target.preset}))
    store.write_evaluation(run, document("0" * 64))  # of a plan that is not here
    app = visit(monkeypatch, clean, preset="REAP", section="Measured")
    assert "has not been measured" not in words(app)
    assert metrics(app)["Measured KL"][0] == "0.5"
    assert titles(app) == [
        "KL divergence from the original", "Perplexity beside the original's",
        "Probes, edited model against the original",
    ]  # fmt: skip
    names = [trace["name"] for trace in charts(app)[0]["data"]]
    assert sorted(name.split(",")[0] for name in names) == ["frequency", "reap"]
    assert app.selectbox(key="measured").value.startswith("reap, 25 %")
    assert "Perplexity has risen" in words(app)
    assert "A note on it" in words(app)
    assert "has not been measured yet" in words(visit(monkeypatch, clean, preset="EAN", section="Measured"))


def test_damaged_evaluations_end_in_a_sentence(monkeypatch: pytest.MonkeyPatch, clean: Path) -> None:
    run = clean / "sample.duckdb"
    with store.open_run(run) as opened:
        plan = planner.make(opened, preset="reap", share=0.25)
    store.write_plan(run, plan.text())
    store.write_evaluation(run, document(plan.digest, divergence={"tokens": "many"}))
    assert "is damaged" in words(visit(monkeypatch, clean, section="Measured"))
    (clean / "sample.plans" / "plan-junk.json").write_text("junk")
    with store.open_run(run) as opened:
        assert list(measured.plan_titles(opened)) == [plan.digest]


def test_a_live_run_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.live(tmp_path)
    assert "when the collection ends" in words(visit(monkeypatch, tmp_path))


def test_a_run_of_one_level_names_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, activations=False)
    app = visit(monkeypatch, tmp_path)
    assert metrics(app)["Predicted error"][0] == "unknown"
    assert "--preset frequency" in turn(app, "Apply")
    text = turn(app, "Presets").replace("\\", "")
    assert "without level activations" in text
    assert "needs the level activations" in text and not charts(app)
    assert "needs the level activations" in turn(app, "Room").replace("\\", "") and not charts(app)


def test_counts_without_a_model_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writer = store.RunWriter.create(tmp_path, "imported", synthetic.info(activations=False))
    shard = synthetic.tables(activations=False)
    shard["layer"] = shard["layer"].with_columns(expert_width=pl.lit(0))
    reason = pl.DataFrame({"subject": ["trace", "outputs"], "reason": ["counts only", "counts only"]})
    writer.write_shard({**{name: shard[name] for name in ("layer", "expert_load", "router_load")}, "omission": reason})
    writer.finish()
    text = words(visit(monkeypatch, tmp_path))
    assert "No plan can be made of this run" in text
    assert "width" in text


def test_an_invalid_run_is_planned_only_on_demand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writer = store.RunWriter.create(tmp_path, "wrong", synthetic.info(activations=False))
    failed = pl.DataFrame({"name": ["layers_seen"], "status": ["fail"], "detail": ["layer 3 was not seen"]})
    writer.write_shard({**synthetic.tables(activations=False), "check": failed})
    writer.finish()
    app = visit(monkeypatch, tmp_path)
    assert "No such plan" in words(app)
    app.toggle(key="allow-invalid").set_value(True).run()
    assert not app.exception
    assert "No such plan" not in words(app)
    assert "--allow-invalid" in turn(app, "Apply")


def test_nothing_can_go_where_tokens_use_every_expert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writer = store.RunWriter.create(tmp_path, "dense", synthetic.info(activations=False))
    shard = synthetic.tables(activations=False)
    shard["layer"] = shard["layer"].head(1).with_columns(top_k=pl.lit(synthetic.EXPERTS))
    shard = {name: frame.filter(layer=1) if "layer" in frame.columns else frame for name, frame in shard.items()}
    writer.write_shard({name: frame for name, frame in shard.items() if len(frame)})
    writer.finish()
    app = visit(monkeypatch, tmp_path)
    assert "No such plan" in words(app)
    assert f"which needs {synthetic.EXPERTS}" in words(app).replace("\\", "")


def test_hostile_names_stay_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, hostile=True, activations=False)
    app = visit(monkeypatch, tmp_path)
    assert "<script" not in words(app).replace("\\<script", "")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_map_draws_what_the_frame_holds(theme: Any) -> None:
    found = frames.units(by_hand.dropping())
    figure = figures.plan_map(found, title="x", theme=theme)
    kept, dropped = (trace for trace in figure.data if trace.type == "heatmap")
    assert [[value == value for value in row] for row in dropped.z.tolist()] == [
        [False, True, False, True], [False, False, True, True],
    ]  # fmt: skip
    assert kept.z[0][2] == dropped.zmax == 1.0  # the first of its layer
    assert dropped.z[0][1] == 0.0
    assert kept.colorscale != dropped.colorscale
    marks = {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data if trace.type == "scatter"}
    assert marks["protected"] == [(2, "1")]
    crosses = next(trace for trace in figure.data if trace.type == "scatter" and trace.marker.symbol == "x-thin")
    assert list(zip(crosses.x, crosses.y, strict=True)) == [(1, "1"), (3, "1"), (2, "2"), (3, "2")]
    assert "place 4 of 4" in dropped.customdata[0][1][1]


def test_maps_of_merges_and_slims() -> None:
    figure = figures.plan_map(frames.units(by_hand.merging()), title="x")
    names = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert "merged into another" in names
    takes = next(trace for trace in figure.data if trace.name == "takes others in")
    assert list(zip(takes.x, takes.y, strict=True)) == [(0, "1"), (2, "1"), (0, "2"), (2, "2")]
    neurons = figures.neuron_map(frames.units(by_hand.slimming()), title="x").data[0]
    assert neurons.z.tolist() == [[0.25, 1, 1, 1], [1, 1, 1, 1]]
    empty = frames.units(by_hand.dropping()).head(0)
    assert "names no expert" in figures.plan_map(empty, title="x").layout.annotations[0].text
    assert "No expert stays" in figures.neuron_map(empty, title="x").layout.annotations[0].text


def test_large_maps_carry_no_marks() -> None:
    wide = by_hand.source(experts=2100)
    plan = by_hand.plan(*by_hand.dropping(experts={1: (0, 1), 2: (0, 1)}).steps, source=wide)
    figure = figures.plan_map(frames.units(plan), title="x")
    assert [trace.name for trace in figure.data if trace.type == "scatter"] == ["kept", "goes"]
    assert all(len(trace.x) == 1 for trace in figure.data if trace.type == "scatter")


def test_measured_figures() -> None:
    one = document("d")
    damage = evaluation.domains(one)
    figure = measured_figures.damage({"one": damage, "<b>two": damage}, quantity="kl")
    assert [trace.name for trace in figure.data] == ["one", "&lt;b&gt;two"]
    assert list(figure.data[0].y) == ["all", "c"]
    assert list(figure.data[0].error_x.arrayminus) == pytest.approx([0.1, 0.1])
    assert list(figure.data[0].error_x.array) == [0.0, 0.0]  # no upper end
    assert measured_figures.damage({"one": damage}, quantity="ratio").layout.xaxis.type is None
    far = damage.with_columns(ratio=pl.lit(20.0))
    assert measured_figures.damage({"one": far}, quantity="ratio").layout.xaxis.type == "log"
    assert "Nothing was measured" in measured_figures.damage({}, quantity="ratio").layout.annotations[0].text
    probes = evaluation.probes(one)
    drawn = measured_figures.probe_differences(probes).data[0]
    assert list(drawn.y) == ["copying (too few)"]
    clear = measured_figures.probe_differences(probes.with_columns(enough=pl.lit(True))).data[0]
    assert clear.marker.color != drawn.marker.color  # too few items say nothing clearly
    assert "No probe" in measured_figures.probe_differences(probes.head(0)).layout.annotations[0].text


def test_plans_as_a_view(clean: Path) -> None:
    from app.commands.show import view

    run = clean / "sample.duckdb"
    with store.open_run(run) as opened:
        assert view(opened, "plans").is_empty()
        plan = planner.make(opened, preset="reap", share=0.25)
        store.write_plan(run, plan.text())
        assert view(opened, "plans")["kl"].to_list() == [None]
        store.write_evaluation(run, document(plan.digest))
        row = view(opened, "plans").row(0, named=True)
    assert (row["plan"], row["experts_after"], row["kl"], row["tokens"]) == ("reap, 25 %, uniform", 72, 0.5, 700)
