"""The section "Is the text enough?" of the Overview, its frames and its alert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import open_section, visited

import store
from app.commands.show import view
from app.figures import coverage as figures
from app.frames import alerts
from app.frames import coverage as frames
from profiler.headline import compute_and_store
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions
from profiler.metrics.coverage import TARGET, lengthened


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 sequences with its metrics. Do not change it."""
    found = synthetic.finished(tmp_path_factory.mktemp("covered"), metrics=False, sequences=40)
    compute_and_store(found)
    return found


@pytest.fixture(scope="module")
def run(path: Path) -> Iterator[store.Run]:
    with store.open_run(path) as opened:
        yield opened


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str) -> AppTest:
    return visited(monkeypatch, directory, **parameters)


def words(app: AppTest) -> str:
    return "\n".join(str(element.value) for kind in (app.markdown, app.info, app.caption) for element in kind)


def titles(app: AppTest) -> list[str]:
    assert not app.exception
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def test_starved_experts_by_hand(run: store.Run) -> None:
    frame = frames.starved(run)
    # The last expert of every layer is never chosen; a balanced router sends k N / E = 2 x 3,200 / 16 tokens.
    assert set(frame.filter(pl.col("tokens") == 0).select("layer", "expert").rows()) == {
        (layer, 15) for layer in synthetic.LAYERS
    }
    assert frame["threshold"].unique().to_list() == [pytest.approx(40.0)]
    assert frame.filter(pl.col("tokens") == 0)["needed"].to_list() == [pytest.approx(40 * 3200 / 3)] * 4


def test_convergence_begins_measured_and_goes_on_expected(run: store.Run) -> None:
    frame = frames.convergence(run).filter((pl.col("score") == "frequency") & (pl.col("goal") == "ranking"))
    measured, expected = (frame.filter(pl.col("kind") == kind) for kind in ("measured", "expected"))
    assert sorted(measured["share"].to_list()) == [1 / 16, 1 / 8, 1 / 4, 1 / 2]
    half = measured.filter(pl.col("share") == 0.5)["value"][0]
    assert expected.filter(pl.col("share") == 0.5)["value"][0] == pytest.approx(half)
    assert expected.filter(pl.col("share") == 2)["value"][0] == pytest.approx(
        float(lengthened(agreement=half, factor=4))
    )
    # Longer texts agree more: the routing of the run is far from uniform.
    assert measured.sort("share")["value"].is_sorted()
    assert (measured["low"] <= measured["value"]).all() and (measured["value"] <= measured["high"]).all()


def test_what_is_needed_gives_the_target(run: store.Run) -> None:
    frame = frames.needed(run)
    assert set(frame["goal"]) == set(frames.GOALS)
    for row in frame.filter(pl.col("goal") == "ranking").iter_rows(named=True):
        reached = lengthened(agreement=row["half"], factor=2 * row["needed"] / row["tokens"])
        assert float(reached) == pytest.approx(TARGET, abs=1e-6)
        assert (row["verdict"] == "enough") == (row["whole"] >= TARGET)


@pytest.mark.parametrize(
    ("half", "needed", "words"),
    [(0.1, 1e9, "no better than chance"), (float("nan"), 1.0, "no better than chance"), (0.99, 900.0, "enough"),
     (0.5, 123_456.0, "collect 120,000 more"), (0.5, 1_042.0, "collect 42 more"), (0.5, 1_005.0, "collect 5 more")],
)  # fmt: skip
def test_verdicts(half: float, needed: float, words: str) -> None:
    assert frames.verdict(half=half, chance_high=0.2, tokens=1_000, needed=needed) == words


def test_the_page_says_how_much_more(path: Path, run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    app = visit(monkeypatch, path.parent, score="frequency", goal="the lowest quarter", section="Rankings")
    row = frames.needed(run).filter((pl.col("score") == "frequency") & (pl.col("goal") == "cut 25 %"))
    assert "Ranked by frequency, the lowest quarter" in words(app)
    if row["verdict"][0] == "enough":
        assert "enough. By its halves" in words(app)
    assert titles(app) == ["Agreement of two texts, experts ranked by frequency"]
    assert titles(open_section(app, "Scores")) == ["Agreement of scores, mean over the layers"]


def test_values_from_the_address_that_are_none_read_as_the_default(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = visit(monkeypatch, path.parent, score="<script>", goal="99", section="Rankings")
    assert app.selectbox(key="goal").value == "ranking"


def test_views_and_alert(run: store.Run) -> None:
    assert view(run, "coverage").equals(frames.starved(run))
    assert view(run, "convergence").equals(frames.needed(run))
    assert not view(run, "agreement").is_empty()
    unsettled = frames.needed(run).filter((pl.col("goal") == "ranking") & (pl.col("verdict") != "enough"))
    found = alerts.alerts(run).filter(pl.col("alert") == "rankings are not settled")
    assert len(found) == (not unsettled.is_empty())
    (starved,) = alerts.alerts(run).filter(pl.col("alert") == "starved experts").iter_rows(named=True)
    assert (
        starved["layers"] == "1, 2, 3, 5" and "4 were never used: only other text may reach them" in starved["detail"]
    )


def test_counts_per_pass_are_halved_and_counts_alone_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.profiler.importers import fixtures

    rates = np.linspace(1, 4, 8)
    counts = np.random.default_rng(0).poisson(30 * rates, size=(64, 2, 8)).astype(np.int32)
    file = fixtures.torch_file(tmp_path / "a.pt", {"logical_count": counts})
    passes = import_run("sglang-stat", file, directory=tmp_path / "p", name="passes", options=ImportOptions(top_k=2))
    with store.open_run(passes) as run:
        frame = frames.needed(run)
        assert frame["score"].unique().to_list() == ["frequency"]
        assert frame.filter(pl.col("goal") == "ranking")["verdict"][0] == "enough"
    lines = "".join(f"{layer},{expert}\n" for layer in range(2) for expert in (0, 1, 1, 2, 3) * 20)
    (tmp_path / "a.csv").write_text("layer,expert\n" + lines)
    options = ImportOptions(num_experts=4, top_k=2)
    counted = import_run("csv", tmp_path / "a.csv", directory=tmp_path / "c", name="counts", options=options)
    with store.open_run(counted) as run:
        assert frames.needed(run).is_empty() and frames.convergence(run).is_empty()
    app = visit(monkeypatch, counted.parent, section="Rankings")
    assert "Whether two texts would rank the experts alike cannot be computed" in words(app)


def test_the_figure_has_words_for_nothing() -> None:
    empty = pl.DataFrame(schema={"kind": pl.String, "tokens": pl.Float64})
    figure = figures.convergence_curve(empty, title="x", tokens=1, target=0.9)
    assert "too short" in figure.layout.annotations[0].text


def test_alerts_say_what_to_do(tmp_path: Path) -> None:
    few = synthetic.finished(tmp_path, metrics=False, sequences=3)
    compute_and_store(few)
    with store.open_run(few) as run:
        (row,) = alerts.alerts(run).filter(pl.col("alert") == "rankings are not settled").iter_rows(named=True)
        assert "two texts of 240 tokens" in row["detail"] and ("collect" in row["detail"] or "chance" in row["detail"])
        assert all(len(detail) <= 300 for detail in alerts.alerts(run)["detail"])
