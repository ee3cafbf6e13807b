"""The Super experts page with ablations beside the run, attention sinks, and documents that someone has damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

import store
from app.figures import ablation as figures
from app.frames import ablation as frames
from app.frames import super_experts
from app.state import plain
from moescope.errors import StoreError


def one_pass(
    name: str, seed: int, experts: list[tuple[int, int]], factor: float, *, wide: float = 0.1
) -> dict[str, Any]:
    def estimate(value: float) -> dict[str, Any]:
        return {"value": value, "low": value * (1 - wide), "high": value * (1 + wide)}

    named = [{"layer": layer, "step": 0, "kind": "routed", "expert": expert} for layer, expert in experts]
    found = {**estimate(8.0 * factor), "tokens": 700, "sequences": 9}
    domains = {"code": {**estimate(4.0 * factor), "tokens": 300}, synthetic.HOSTILE: {**estimate(9.0), "tokens": 400}}
    return {
        "name": name,
        "seed": seed,
        "experts": named,
        "perplexity": found,
        "ratio": estimate(factor),
        "sink_decay": 0.75 if name == "ablated" else 0.01,
        "residual_max": 900.0,
        "per_domain": domains,
    }


def document(
    *, expert: int = 5, factor: float = 6.9, more: bool | None = True, sentence: str = "Yes: more."
) -> dict[str, Any]:
    chosen = [(2, expert)]
    controls = [
        one_pass(name, seed, [(3, seed)], 1.0 + 0.01 * seed) for name in ("random", "same layers") for seed in range(2)
    ]
    layers = [
        {"layer": layer, "sink": None if layer == 1 else 0.6, "sink_ablated": None if layer == 1 else 0.06,
         "sink_decay": None if layer == 1 else 0.9, "control_sink_decay": None if layer == 1 else 0.02,
         "residual_max": 900.0, "residual_max_ablated": 9.0,
         "massive": True, "massive_ablated": False, "channel": 11}
        for layer in range(6)
    ]  # fmt: skip
    return {
        "kind": "ablation", "version": 1, "model": {"name": "tiny"}, "experts": one_pass("", 0, chosen, 1)["experts"],
        "data": {"files": ["a.txt"]}, "base": one_pass("base", 0, [], 1.0),
        "ablated": one_pass("ablated", 0, chosen, factor), "controls": controls, "layers": layers,
        "notes": [f"A note {synthetic.HOSTILE}."],
        "verdict": {"more_than_controls": more, "against_worst": None, "sentence": sentence},
    }  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished run whose levels include attention."""
    writer = store.RunWriter.create(tmp_path, "seen", synthetic.info())
    writer.info.levels = "routing,activations,attention"
    sinks = [
        {
            "layer": layer,
            "domain": domain,
            "phase": "prompt",
            "queries": 10 * (1 + place),
            "sink_sum": [2.0, 8.0 + 8 * place],
        }
        for layer in (0, 2)
        for place, domain in enumerate(("code", "deutsch"))
    ]
    writer.write_shard({**synthetic.tables(), "attention": pl.DataFrame(sinks)})
    found = writer.finish()
    store.write_metrics(found, synthetic.derived())
    return found


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, section: str = "Switched off") -> AppTest:
    return visited(monkeypatch, directory, "super_experts", section=section)


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.caption, app.subheader, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def titles(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def test_sinks_are_weighted_by_queries(path: Path) -> None:
    with store.open_run(path) as run:
        frame = super_experts.attention_sinks(run)
        # Heads: (2 + 2) / 30 and (8 + 16) / 30.
        np.testing.assert_allclose(frame.select("mean", "low", "high").row(0), [14 / 30, 4 / 30, 24 / 30])
        assert frame["queries"].to_list() == [30, 30]
        one = super_experts.attention_sinks(run, domain="code")
        np.testing.assert_allclose(one.select("mean", "low", "high").row(0), [0.5, 0.2, 0.8])
        assert super_experts.attention_sinks(run, domain="none").is_empty()


def test_without_an_ablation_the_page_says_how(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    app = visit(monkeypatch, path.parent)
    assert f"moescope ablate MODEL --super-experts {path} --data PATH" in words(app)
    assert "No experts have been switched off yet" in words(app)
    app = visit(monkeypatch, path.parent, "Residual stream")
    assert titles(app) == ["Residual stream after each layer", "Attention on the first position"]
    assert "Massive activations form in layer 2." in words(app)


def test_an_ablation_is_shown(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    store.write_evaluation(path, document())
    app = visit(monkeypatch, path.parent)
    assert titles(app) == [
        "Perplexity when experts are switched off",
        "Attention sink, before and after",
        "Massive activations, before and after",
    ]
    assert plain("Yes: more.") in [element.value for element in app.warning]
    shown = {"passes": "ratio", "layers": "sink_ablated", "domains": "base"}
    for name, column in shown.items():
        app.session_state["figures"] = name
        app.run()
        assert column in app.dataframe[0].value.columns, name
    assert "Largest decay 90.0% in layer 5, at most 2.0% for any control there." in words(app)
    assert "700 predicted tokens; unchanged perplexity 8" in words(app)
    assert "<script" not in words(app).replace("\\<script", "")
    assert not app.selectbox or "ablation" not in {box.key for box in app.selectbox}


def test_the_newest_comes_first_and_others_can_be_chosen(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    store.write_evaluation(path, document())
    store.write_evaluation(path, document(expert=6, factor=1.0, more=False, sentence="No: not more."))
    app = visit(monkeypatch, path.parent)
    assert plain("No: not more.") in [element.value for element in app.info]
    assert app.selectbox(key="ablation").options == ["2:6 on 700 tokens", "2:5 on 700 tokens"]
    app.selectbox(key="ablation").select_index(1).run()
    assert not app.exception
    assert plain("Yes: more.") in [element.value for element in app.warning]


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "ablation", "version": 1}'])
def test_a_damaged_document_is_a_sentence(monkeypatch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    store.write_evaluation(path, document()).write_text(text)
    app = visit(monkeypatch, path.parent)
    assert "cannot be read" in app.error[0].value
    assert not titles(app)
    assert len(titles(visit(monkeypatch, path.parent, "Outputs"))) == 2  # the rest of the page is there


def test_a_document_without_its_parts_is_a_sentence(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    store.write_evaluation(path, {**document(), "layers": [{}]})
    assert "is damaged" in visit(monkeypatch, path.parent).error[0].value
    with pytest.raises(StoreError, match="is damaged"):
        frames.layers({**document(), "layers": [{}]})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_draw_what_the_frames_hold(theme: Any) -> None:
    passes, layers = frames.passes(document()), frames.layers(document())
    figure = figures.perplexity_ratios(passes, theme=theme)
    drawn = {trace.name: list(trace.x) for trace in figure.data}
    assert drawn["switched off"] == [6.9]
    assert drawn["random controls"] == [1.0, 1.01]
    np.testing.assert_allclose(figure.data[0].error_x.array, [0.69])
    assert "base" not in str(drawn)
    sinks = figures.sinks_before_and_after(layers, theme=theme)
    assert [list(trace.y) for trace in sinks.data] == [[0.6] * 5, [0.06] * 5]
    residual = figures.residual_before_and_after(layers, theme=theme)
    assert set(residual.data[0].marker.symbol) == {"diamond"}
    assert set(residual.data[1].marker.symbol) == {"circle"}


def test_figures_of_nothing_say_so() -> None:
    empty = frames.passes(document()).head(0)
    assert "Nothing was measured" in figures.perplexity_ratios(empty).layout.annotations[0].text
    assert "softmax" in figures.sinks_before_and_after(frames.layers(document()).head(0)).layout.annotations[0].text
    unknown = frames.passes({**document(), "controls": []}).with_columns(
        ratio_low=pl.lit(None, dtype=pl.Float64), ratio_high=pl.lit(None, dtype=pl.Float64)
    )
    assert list(figures.perplexity_ratios(unknown).data[0].error_x.array) == [0.0]
