"""The page What-if routing: every section, runs without scores, one expert per token, live and empty runs, steering."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import open_section, visited

import store
from app import jobs
from app.frames import what_if as frames
from app.frames import what_if_advice as advice
from app.frames import what_if_plan
from compressor.plan import Plan
from planner.route import balanced
from store import LayerInfo

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
from test_route_plans import EXPERTS, TOP_K, chosen, logits, write

SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.evaluations"
SECTIONS = {
    "Curves": ("Top-p routing: what is kept", "Active experts by value", "Active experts, layer by layer"),
    "Layers": (
        "Active experts per layer", "Kept mass and changed tokens per layer", "Balance of the load per layer",
        "How the load of each expert changes",
    ),
    "Balance": (
        "Balance of the load per layer", "Kept mass and changed tokens per layer",
        "How the load of each expert changes",
    ),
    "Smoothing": ("Smoothing over like tokens", "Entropy of router probabilities"),
    "Tiers": ("Precision tiers: shares of the selections", "Bits per weight: 16 high, 4 low"),
    "Steering": ("Load of the experts of layer 0",),
    "Live": (),
    "Advice": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run that has router scores of all experts."""
    return write(tmp_path_factory.mktemp("store")).parent


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str) -> AppTest:
    return visited(monkeypatch, directory, "what_if", **parameters)


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.success, app.caption, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def titles(app: AppTest) -> tuple[str, ...]:
    return tuple(json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart"))


def test_every_section_draws_its_charts(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory)
    for name, expected in SECTIONS.items():
        open_section(app, name)
        assert titles(app) == expected, name
        assert not app.error and not app.warning, name
    assert "moescope sweep" in words(open_section(app, "Live"))


def test_the_sentence_says_what_sorting_says(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, rule="Another k", value="3")
    probabilities = -np.sort(-_softmax(), -1)
    kept, own = (float(probabilities[..., :k].sum(-1).mean()) for k in (3, TOP_K))
    said = words(app)
    assert f"**3.00 experts** per token on average instead of {TOP_K}.00" in said
    assert f"keeps **{kept:.1%}** of router probability ({own:.1%} as it is) at **150%**" in said


def _softmax() -> np.ndarray:
    values = np.exp(logits())
    return values / values.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rule": "<script>", "value": "1e999"},
        {"value": "-1", "domain": "none"},
        {"weights": "odd", "push-step-0": "x"},
    ],
)
def test_damaged_choices_in_the_address_fall_back(
    monkeypatch: pytest.MonkeyPatch, directory: Path, parameters: dict[str, str]
) -> None:
    app = visit(monkeypatch, directory, **parameters)
    assert titles(app)[0] == SECTIONS["Curves"][0] and "<script>" not in words(app)
    open_section(app, "Steering")


def test_a_bias_moves_what_sorting_says_and_becomes_a_plan(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, section="Steering", layer="1", expert="5")
    assert "**Nothing** is steered in layer 1" in words(app)
    step = app.number_input(key="push-step-1").value
    next(one for one in app.button if one.label == "Push expert 5 up").click().run()
    assert not app.exception
    bias = np.zeros(EXPERTS)
    bias[5] = round(step, 4)
    now, then = chosen(logits()[1]), chosen(logits()[1], bias)
    changed = sum(a != b for a, b in zip(now, then, strict=True))
    assert f"Of {len(now):,} tokens **{changed:,} ({changed / len(now):.1%})** get other experts" in words(app)
    assert titles(app) == ("Load of the experts of layer 1", "By domain, layer 1")
    next(one for one in app.button if one.label == "Keep beside the run").click().run()
    plans = [Plan.load(one) for one in store.list_plans(directory / "known.duckdb")]
    kept = next(one for one in plans if one.route is not None and one.route.method == "steering")
    assert kept.route is not None and kept.route.layers[0].bias == tuple(bias)
    next(one for one in app.button if one.label == "Away from expert 5").click().run()
    assert not app.exception
    next(one for one in app.button if one.label == "Clear").click().run()
    assert "**Nothing** is steered in layer 1" in words(app)
    next(one for one in app.button if one.label == "Towards even load").click().run()
    assert not app.exception
    judged = balanced(store.open_run(directory / "known.duckdb"), LayerInfo(1, 0, "m", "E", "R", EXPERTS, TOP_K, 0, 24))
    told = (
        f"not fitted on ({judged.tokens:,} tokens), the load's coefficient of variation goes from {judged.before:.3f}"
    )
    assert f"{told} to {judged.after:.3f}" in words(app)


def test_the_live_form_refuses_what_is_no_checkpoint(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, section="Layers")
    next(one for one in app.button if one.label == "Measure").click().run()
    assert any("where is the checkpoint" in one.value for one in app.error)


def test_a_run_without_scores_shows_what_gate_weights_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    app = visit(monkeypatch, write(tmp_path, scored=False).parent)
    said = words(app)
    assert "proxy" in said and "Not shown: " in said and "router scores" in said
    assert app.get("button_group")[0].proto.options
    open_section(app, "Steering")
    assert "--router-scores" in words(app)


def test_one_expert_per_token_hides_rules_that_skip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    app = visit(monkeypatch, write(tmp_path, top_k=1).parent)
    assert titles(app)[0] == "Another k: what is kept"
    assert "makes no sense with one expert per token" in words(app)


def test_runs_that_cannot_be_tried_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path / "live")
    assert "when the collection ends" in words(visit(monkeypatch, tmp_path / "live"))
    assert writer is not None


def test_the_first_value_keeps_most_of_the_mass(directory: Path) -> None:
    with store.open_run(directory / "known.duckdb") as run:
        frame = frames.curve(frames.found(run, method="ratio"))
        row = frame.filter(frame["value"] == frames.proposed(frame)).row(0, named=True)
        assert row["kept_mass"] >= frames.KEPT
        fewer = frame.filter(frame["mean_active"] < row["mean_active"])
        assert (fewer["kept_mass"] < frames.KEPT).all()
        assert what_if_plan.title(what_if_plan.made(run, rule="ratio", value=0.5)) == "route by ratio 0.5, 2 layers"


def test_values_found_layer_by_layer_become_plans_of_them(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, section="Layers", rule="Ratio skipping by layer (ODP)", value="1")
    assert "values were found on every other sequence" in words(app) and not app.warning
    with store.open_run(directory / "known.duckdb") as run:
        result = frames.found(run, method="odp")
        plan = what_if_plan.made(run, **frames.as_rule(result, "odp", 1.0))
    shares = -np.sort(-_softmax(), -1)[:, ::2]  # the first of every two sequences, on which values are found
    medians = np.median(shares[..., 1] / shares[..., 0], axis=(1, 2))
    assert plan.route is not None
    values = [one.value for one in plan.route.layers]
    np.testing.assert_allclose(values, medians, atol=0.01)  # weights are stored in 8 bits
    assert plan.digest[:12] in words(app)
    app = visit(monkeypatch, directory, rule="Null experts, so many left", value="1")
    assert "leaves **1.0" in words(app)


def test_both_thresholds_of_the_tiers_can_be_chosen(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    app = visit(monkeypatch, directory, section="Tiers", t1="0.5", t2="0.7")
    shares = -np.sort(-_softmax(), -1)[..., :TOP_K]
    before = shares[..., 0] / shares.sum(-1)  # of the second of two experts; nothing lies before the first
    high, out = (1 + (before <= 0.5).mean()) / 2, (before > 0.7).mean() / 2
    said = words(app)
    assert "T1 = 0.5 and T2 = 0.7" in said
    shown = [
        float(part.split("**")[0].rstrip("%")) / 100 for part in said.split("T2 = 0.7, **")[1].split(" and **")[:2]
    ]
    np.testing.assert_allclose(shown, [high, out], atol=0.015)


def test_live_loss_starts_a_job_and_its_result_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = write(tmp_path / "runs")
    model, texts = tmp_path / "model", tmp_path / "text.txt"
    texts.write_text("held out")
    model.mkdir()
    fields = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": EXPERTS}
    (model / "config.json").write_text(json.dumps(fields))
    (model / "model.safetensors").touch()
    started: list[jobs.Job] = []
    monkeypatch.setattr(jobs, "_launch", lambda job: started.append(job) or job)
    app = visit(monkeypatch, run.parent, section="Layers", value="0.4")

    def measure(folder: Path) -> None:
        app.text_input(key="live-source-rule").input(str(folder))
        app.text_area(key="live-texts-rule").input(str(texts))
        next(one for one in app.button if one.label == "Measure").click().run()
        assert not app.exception

    measure(tmp_path)
    assert "is no folder of a checkpoint" in words(app) and not started
    measure(model)
    (job,) = started
    command = list(job.commands[0])
    plan = Plan.load(Path(command[command.index("--plan") + 1]))
    assert plan.digest == job.digest and plan.route is not None and plan.route.layers[0].value == 0.4
    assert command[:2] == ["sweep", str(model)] and command[-2:] == ["--data", str(texts)]
    assert command[command.index("--against") + 1] == str(run)
    _measured(run, plan.digest)
    assert "13,075 tokens: it costs 0.2000 nats per token (95 % interval +0.1000 to +0.3000)" in words(app.run())


def _measured(run: Path, digest: str) -> dict[str, Any]:
    """A sweep of one plan beside the run, in the words of the bundled one."""
    document = json.loads(next(SAMPLE.glob("sweep-*.json")).read_text())
    rule = next(one for one in document["rules"] if one["rule"] == "top_p")
    rule |= {"rule": "plan", "value": digest, "change": {"value": 0.2, "low": 0.1, "high": 0.3}}
    document["rules"] = [rule]
    store.write_evaluation(run, document)
    return document


def test_a_damaged_sweep_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = write(tmp_path)
    document = _measured(run, "0" * 64)
    (path,) = store.list_evaluations(run, "sweep")
    app = visit(monkeypatch, tmp_path, section="Live")
    assert titles(app) and not app.warning
    without = {name: value for name, value in document.items() if name != "rules"}
    for damaged in (without, document | {"rules": None}, document | {"rules": [{"rule": "top_p"}]}):
        path.write_text(json.dumps(damaged))
        assert "sweep" in open_section(app, "Live").warning[0].value and not titles(app)
    path.write_text(json.dumps(document | {"rules": []}))
    app.session_state["live"] = "Loss"
    assert "This sweep tried no rule" in words(open_section(app, "Live"))
    assert titles(open_section(app, "Layers")) and not app.error


def test_advice_says_where_statistics_disagree() -> None:
    holds = pl.DataFrame({"suggest": ["ratio skipping, tiers", "a larger k"], "avoid": ["", "skipping, top-p"]})
    assert advice.disputed(holds) == ["skipping"] and advice.disputed(holds.head(1)) == []
