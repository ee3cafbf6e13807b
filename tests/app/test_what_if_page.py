"""The page What-if routing: every section, runs without scores, one expert per token, live and empty runs, steering."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import open_section, visited

import store
from app.frames import what_if as frames
from app.frames import what_if_plan
from compressor.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
from test_route_plans import EXPERTS, TOP_K, chosen, logits, write

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
        {"weights": "odd", "push-step": "x"},
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
    step = app.number_input(key="push-step").value
    next(one for one in app.button if one.label == "Expert 5 up").click().run()
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
