"""The page Compare and its figures, on runs that agree by half, and on those that cannot be compared."""

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

from app.figures import comparison as figures
from app.frames import comparison as frames
from tests.profiler.paired import LAYERS, routed, texts, write

TITLES = {
    "Agreement": ["Agreement of the selections"],
    "Flips": ["Gate weight that left, all layers", "Gate weight that left against what came, all layers"],
    "Load": [
        "Load of each expert in both runs",
        "Load of each expert, second run minus first",
        "Load that moves",
        "Load by rank, layer 1",
        "How even the load is in both runs",
    ],
    "Text": [],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store: one text in "base" and in "tuned", whose later half is routed anew; other tokenizers; no token ids."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    tokens = texts(rng, [40] * 8)
    base, other = routed(rng, tokens), routed(rng, tokens)
    late = (np.arange(40) >= 20)[None, :, None]
    tuned = [np.where(late, two, one) for one, two in zip(base, other, strict=True)]
    pieces = {token: f"{synthetic.HOSTILE}{token}".encode() for token in range(12)}
    write(folder, "base", tokens, base, pieces=pieces).close()
    write(folder, "tuned", tokens[:7], tuned[:7], pieces=pieces).close()
    write(folder, "foreign", tokens, base, pieces={token: b"x%d" % token for token in range(12)}).close()
    write(folder, "silent", tokens, base, keep_text=False).close()
    return folder


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str) -> AppTest:
    app = visited(monkeypatch, directory, "compare", **parameters)
    assert not app.error
    return app


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.caption, app.subheader)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def opened(app: AppTest, section: str) -> AppTest:
    app.button_group(key="section").set_value(section).run()
    assert not app.exception, app.exception[0].message
    return app


def charts(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def test_the_page_shows_two_runs(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    app = visit(monkeypatch, runs, run="base", other="tuned")
    assert charts(app) == TITLES["Agreement"]
    said = words(app)
    assert "Compared: 7 sequences, 280 tokens. Without partner, and left out: 1 of 8 sequences of `base`" in said
    assert "7 sequences, 280 tokens; bands: 95 %" in said
    assert "two checkpoints of one shape" in said.lower() and "moescope evaluate" in said
    shares = {metric.label: float(metric.value.rstrip("%")) for metric in app.metric}
    assert 0.5 < shares["Experts in common"] / 100 < 0.8
    assert shares["Same set"] >= 50
    opened(app, "Flips")
    assert charts(app) == TITLES["Flips"] and "With `--router-scores`" in words(app)
    changed = app.dataframe[-1].value
    assert changed["overlap"].is_monotonic_increasing
    assert changed["occurrences"].sum() == 280
    assert synthetic.HOSTILE in changed["text"].iloc[0]  # a data frame shows text as it is
    assert all("<script" not in chart.proto.spec for chart in app.get("plotly_chart"))
    app.selectbox(key="layer").select(str(LAYERS[1])).run()
    assert charts(app)[0] == f"Gate weight that left, layer {LAYERS[1]}"
    app.selectbox(key="layer").set_value(None)
    assert charts(opened(app, "Load")) == TITLES["Load"]
    app.selectbox(key="run").select("tuned").run()
    assert not app.exception


def test_text_of_the_sequence_that_flips_most(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    app = opened(visit(monkeypatch, runs, run="base", other="tuned"), "Text")
    assert charts(app) == []
    flips, sequences = (app.dataframe[place].value for place in (-2, -1))
    assert (flips["position"] >= 20).all()  # the later half is routed anew
    most = sequences.iloc[0]
    assert sequences["flip_share"].is_monotonic_decreasing and len(sequences) == 7
    assert f"Sequence {most['sequence']}, " in words(app) and "of 40 tokens flip in some layer" in words(app)
    app.number_input(key="sequence").set_value(6).run()
    app.selectbox(key="layer").select("2").run()
    assert not app.exception and "Sequence 6, " in words(app) and "tokens flip in layer 2" in words(app)
    app.button_group(key="strip").set_value("flip").run()
    assert not app.exception


def test_reasons_stand_on_the_page(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    app = visit(monkeypatch, runs, run="base", other="foreign")
    assert "cannot be compared token by token: " in words(app)
    assert "different tokenizers" in words(app) and "What can still be compared" in words(app)
    assert charts(app) == ["How even the load is in both runs"]
    app.selectbox(key="other").select("silent").run()
    assert "keeps no token ids" in words(app)
    app.button_group(key="pairs").set_value("position").run()
    assert not app.exception
    assert charts(app) == TITLES["Agreement"]
    assert charts(opened(app, "Flips")) == []  # nothing flips
    assert "No token flips" in words(app) and "No token id is known" in words(app)
    assert charts(opened(app, "Text")) == []


def test_bad_values_in_the_url_fall_back(monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    app = visit(monkeypatch, runs, run="base", other="../../etc/passwd", pairs="<b>", section="99")
    assert app.selectbox(key="other").value == "foreign"
    assert "base" not in app.selectbox(key="other").options


def test_a_store_of_one_run_and_a_live_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, "done")
    synthetic.live(tmp_path, "growing")
    assert "no other finished run" in words(visit(monkeypatch, tmp_path, run="done"))
    assert "when the collection has ended" in words(visit(monkeypatch, tmp_path, run="growing"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_draw_what_the_frames_hold(theme: Any, runs: Path) -> None:
    import store

    with store.open_run(runs / "base.duckdb") as base, store.open_run(runs / "tuned.duckdb") as tuned:
        found = frames.tables(base, tuned)
    layers = found["layers"]
    curves = {trace.name: trace for trace in figures.agreement_curves(layers, theme=theme).data if trace.name}
    for name, label in figures.MEASURES.items():
        assert list(curves[label].y) == layers[name].to_list()
    assert list(curves["experts in common, random"].y) == layers["chance"].to_list()
    assert figures.agreement_curves(layers, theme=theme).layout.yaxis.range is None
    near = layers.with_columns(
        pl.lit(0.98).alias(name + end) for name in figures.MEASURES for end in ("", "_low", "_high")
    )
    assert figures.agreement_curves(near, theme=theme).layout.yaxis.range[0] == pytest.approx(0.978, abs=2e-4)
    moved = {trace.name: trace for trace in figures.load_curve(layers, theme=theme).data if trace.name}
    assert list(moved["load moved"].y) == layers["total_variation"].to_list()
    np.testing.assert_allclose(moved["selections changed"].y, 1 - layers["overlap"].to_numpy())
    heat = figures.load_difference_map(found["load"], theme=theme).data[0]
    assert np.nansum(heat.z, axis=1) == pytest.approx(0, abs=1e-4)
    gap = found["margins"].filter(margin="weight_gap", label="all")
    (bars,) = figures.margin_bars(gap, margin="weight_gap", theme=theme).data
    assert sum(bars.y) == pytest.approx(1)
    both = figures.load_pair_map(found["load"], names=("base", "tuned"), theme=theme)
    for trace, column in zip(both.data, ("share", "other_share"), strict=True):
        shares = found["load"][column].to_numpy().reshape(2, -1)
        np.testing.assert_allclose(trace.z, np.clip(np.log2(shares * 8), -1, 1), atol=1e-5)
    nothing = figures.margin_bars(gap.with_columns(flipped=pl.lit(0)), margin="weight_gap", theme=theme)
    assert nothing.layout.annotations[0].text == "No token flips here."


def test_margins_beside_tokens_that_do_not_flip() -> None:
    frame = pl.DataFrame(
        {
            "low": [0.0, 0.5, 1.0, 8.0], "high": [0.5, 1.0, 8.0, None], "flipped": [3, 1, 0, 0],
            "unchanged": [1, 2, 0, 5], "flip_share": [0.75, 1 / 3, None, 0.0],
        }
    )  # fmt: skip
    flipped, unchanged = figures.margin_bars(frame, margin="boundary_margin").data
    assert list(flipped.x) == ["< 0.5", "0.5 – 1", "1 – 8", "≥ 8"]
    assert list(flipped.y) == [0.75, 0.25, 0, 0]
    assert list(unchanged.y) == pytest.approx([1 / 8, 2 / 8, 0, 5 / 8])
