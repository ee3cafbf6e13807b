"""Specialization on the page Routing: its frames, figures and section, and what runs that lack it say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

import store
from app.commands.show import view
from app.figures import specialization as figures
from app.frames import specialization as frames
from profiler.headline import compute_and_store


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its own metrics. Do not change it."""
    found = synthetic.finished(tmp_path_factory.mktemp("special"), metrics=False, sequences=12)
    compute_and_store(found)
    return found


@pytest.fixture(scope="module")
def special(path: Path) -> Iterator[store.Run]:
    with store.open_run(path) as opened:
        yield opened


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str) -> tuple[AppTest, str]:
    app = visited(monkeypatch, directory, "routing", section="Purpose", **parameters)
    kinds = (app.markdown, app.info, app.caption)
    return app, "\n".join(str(element.value) for kind in kinds for element in kind)


def _choose(app: AppTest, key: str, value: str) -> None:
    (group,) = [group for group in app.button_group if group.key == key]
    group.set_value(value).run()


def titles(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def test_figures_stand_beside_their_controls(special: store.Run) -> None:
    frame = frames.specialization(special)
    assert frame.unique(["kind", "form"]).height == 6  # domain, input and next, in two forms
    layers = frame.filter(pl.col("layer").is_not_null())
    assert set(layers["label"]) == {str(layer) for layer in synthetic.LAYERS}
    assert layers["shuffled"].null_count() == 0
    domains = frame.filter((pl.col("kind") == "domain") & (pl.col("form") == "largest") & pl.col("layer").is_not_null())
    assert set(domains["uniform"]) == {synthetic.TOP_K / synthetic.EXPERTS}
    assert (domains["value"] > domains["shuffled"]).all()  # its domains prefer experts of their own
    tokens = frame.filter((pl.col("metric") == "vocabulary_specialization") & (pl.col("at") == 10.0))
    assert ((tokens["value"] - tokens["shuffled"]).abs() < 0.1).all()  # ids are drawn without regard to experts
    assert view(special, "specialization").equals(frame)


def test_experts_have_both_figures(special: store.Run) -> None:
    frame = frames.experts(special, kind="domain")
    stored = special.metrics("domain_variation").filter((pl.col("layer") == 2) & (pl.col("expert") == 5))
    srp = special.metrics("srp").filter((pl.col("layer") == 2) & (pl.col("expert") == 5) & (pl.col("at") == 16.0))
    row = frame.filter((pl.col("layer") == 2) & (pl.col("expert") == 5)).row(0, named=True)
    assert (row["specialization"], row["srp"]) == (stored["value"][0], srp["value"][0])
    found = frames.correlations(special)
    assert found["kind"].to_list() == ["domain", "input", "next"]
    assert (found["low"] < found["high"]).all()


def test_the_section_shows_kinds_and_forms(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    app, words = visit(monkeypatch, path.parent)
    assert "Specialization in a domain" in titles(app)
    assert "Do specialised experts serve segments?" in titles(app)
    assert "experts renamed inside their layers give" in words
    assert "Predicted tokens: level `predictions`" in words
    _choose(app, "for", "next")
    assert not app.exception
    assert "Specialization in the next token" in titles(app)
    _choose(app, "form", "largest")
    assert not app.exception


def test_a_run_without_its_metrics_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, metrics=False)
    _, words = visit(monkeypatch, tmp_path)
    assert "Specialization has not been computed" in words


def test_without_text_tokens_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compute_and_store(synthetic.finished(tmp_path, metrics=False, text=False))
    app, words = visit(monkeypatch, tmp_path)
    assert "takes the token ids of the text: this run keeps no text" in words.replace("\\", "")
    assert "Specialization in a domain" in titles(app)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_draw_what_the_frames_hold(theme: Any, special: store.Run) -> None:
    frame = frames.specialization(special)
    part = frame.filter((pl.col("kind") == "domain") & (pl.col("form") == "largest"))
    curve = figures.layer_curve(part, title="x", y="y", theme=theme)
    assert list(curve.data[2].y) == part.drop_nulls("layer")["value"].to_list()
    assert [trace.name for trace in curve.data][3:] == ["shuffled over all text", "random experts"]
    points = frames.experts(special, kind="domain")
    assert list(figures.srp_scatter(points, title="x", x="x", theme=theme).data[0].y) == points["srp"].to_list()
    assert "nothing" in figures.layer_curve(part.clear(), title="x", y="y").layout.annotations[0].text
    assert "No expert" in figures.srp_scatter(points.clear(), title="x", x="x").layout.annotations[0].text
