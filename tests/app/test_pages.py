"""Every page on every kind of run, through Streamlit's own test runner."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

import store
from app.views import PAGES

ROOT = Path(__file__).parents[2] / "app"
FILES = [f"views/{Path(page.file).name}" for page in PAGES]
# Charts of the section that each page opens with; a page that is not listed must draw one at least.
CHARTS = {
    "overview": 0,
    "routing": 2,
    "tokens": 1,
    "expert": 2,
    "super_experts": 2,
    "local_consistency": 2,
    "similarity": 1,  # the synthetic run has one kind
    "architecture": 2,
    "what_if": 3,
    "compare": 0,
    "compress": 0,  # the synthetic run lacks the stream, by which plans are priced
    "cache": 0,  # it asks first how large the model is beside its experts
    "placement": 4,
    "data": 0,  # the answer of a question is first a table
}
Opener = Callable[..., AppTest]
OTHER_RUNS: dict[str, dict[str, Any]] = {
    "without text": {"text": False},
    "routing alone": {"activations": False},
    "without metrics": {"metrics": False},
    "hostile": {"hostile": True},
}


@pytest.fixture
def open_app(monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Opens the dashboard on a store, with query parameters, or one page of it by its file; it must not raise."""

    def opener(directory: Path, file: str = "", **parameters: str) -> AppTest:
        return visited(monkeypatch, directory, Path(file).stem, **parameters)

    return opener


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store for each kind of run, so that pages share what is made of it. Do not change them."""
    stores = {name: tmp_path_factory.mktemp("store") for name in OTHER_RUNS}
    for name, directory in stores.items():
        synthetic.finished(directory, **OTHER_RUNS[name])
    return stores


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A store for each number of shards that a run has which is being collected. Do not change them."""
    stores = {shards: tmp_path_factory.mktemp("live") for shards in (0, 1, 3)}
    for shards, directory in stores.items():
        synthetic.live(directory, shards=shards)
    return stores


def texts(app: AppTest) -> str:
    """All sentences that stand on the page."""
    kinds = (app.markdown, app.info, app.warning, app.error, app.caption, app.title, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def charts(app: AppTest) -> list[dict]:
    """The specifications of the charts on the page."""
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def assert_charts(app: AppTest, file: str) -> None:
    """The page draws as many charts as it should."""
    expected = CHARTS.get(Path(file).stem)
    assert len(charts(app)) == expected if expected is not None else charts(app)


@pytest.mark.parametrize("file", FILES)
def test_every_page_opens_on_a_finished_run(open_app: Opener, finished_path: Path, file: str) -> None:
    app = open_app(finished_path.parent, file)
    assert_charts(app, file)
    assert not app.error
    assert all(chart.proto.alt for chart in app.get("plotly_chart"))
    # Each chart has a sentence that says how to read it, and its downloads.
    assert len(app.caption) >= len(charts(app))
    assert len(app.get("download_button")) >= 3 * len(charts(app))


@pytest.mark.parametrize("file", FILES)
def test_every_page_of_an_empty_store_says_what_to_do(open_app: Opener, tmp_path: Path, file: str) -> None:
    app = open_app(tmp_path / "nothing here", file)
    commands = [code.value for code in app.code]
    assert "moescope demo" in commands
    assert "moescope collect MODEL --data PATH" in commands


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_every_page_of_a_live_run(open_app: Opener, growing: dict[int, Path], file: str, shards: int) -> None:
    app = open_app(growing[shards], file)
    progress = app.get("progress")[0].proto
    assert f"{240 * shards:,} of 10,000 tokens" in progress.text
    assert "120 tokens/s" in progress.text
    if file.endswith("local_consistency.py"):
        assert "when the collection ends" in texts(app)


def test_a_live_run_that_becomes_finished_is_shown_as_finished(open_app: Opener, tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path, shards=2)
    app = open_app(tmp_path, FILES[1])
    assert app.get("progress")
    writer.finish(seconds=1.0)
    app.run()
    assert not app.exception
    assert not app.get("progress")
    assert app.session_state["run"] == "growing"


def test_a_run_that_is_being_collected_is_offered_beside_a_finished_one(open_app: Opener, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, "done")
    synthetic.live(tmp_path, "growing")
    app = open_app(tmp_path)
    assert app.session_state["run"] == "done"
    app.sidebar.button(key="watch-growing").click().run()
    assert not app.exception
    assert app.session_state["run"] == "growing"
    assert app.get("progress")


def test_an_interrupted_collection_says_how_to_go_on(open_app: Opener, tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path)
    writer.write_progress(store.Progress(tokens=240, token_budget=10_000, state="interrupted", detail="Ctrl-C"))
    app = open_app(tmp_path, FILES[0])
    assert "--resume" in texts(app)


@pytest.mark.parametrize("file", FILES)
def test_every_page_of_a_run_without_text(open_app: Opener, others: dict[str, Path], file: str) -> None:
    app = open_app(others["without text"], file)
    if file.endswith("tokens.py"):
        assert "keeps no text" in texts(app)
        assert len(charts(app)) == 1


@pytest.mark.parametrize("file", FILES)
def test_every_page_of_a_routing_run(open_app: Opener, others: dict[str, Path], file: str) -> None:
    app = open_app(others["routing alone"], file)
    if file.endswith("super_experts.py"):
        assert "--level routing,activations" in texts(app)
        assert not charts(app)


@pytest.mark.parametrize("file", FILES)
def test_every_page_without_derived_metrics(open_app: Opener, others: dict[str, Path], file: str) -> None:
    app = open_app(others["without metrics"], file)
    if file.endswith("local_consistency.py"):
        assert "moescope runs compute" in texts(app)


@pytest.mark.parametrize("file", FILES)
def test_hostile_text_never_becomes_markup(open_app: Opener, others: dict[str, Path], file: str) -> None:
    app = open_app(others["hostile"], file)
    for element in (*app.markdown, *app.caption, *app.info, *app.warning):
        # A backslash before "<" makes it text in Markdown.
        assert not re.search(r"(?<!\\)<", element.value), element.value
        assert not getattr(element.proto, "allow_html", False)
    for spec in charts(app):
        assert "<script" not in json.dumps(spec)
        assert "<img" not in json.dumps(spec)


@pytest.mark.parametrize("file", FILES)
def test_bad_values_in_the_url_fall_back(open_app: Opener, finished_path: Path, file: str) -> None:
    bad = {
        "run": "../../etc/passwd", "domain": "'; drop table run; --", "layer": "999", "sequence": "-4", "token": "9e99",
        "phase": "x", "scale": "<b>", "quantity": "", "segment": "1e3", "cache": "0", "policy": "[]", "rho": "nan",
        "over": "?", "colour": "x", "part": "77", "published": "maybe",
        "devices": "-3", "nodes": "7", "redundant": "1e9", "method": "magic", "requests": "0",
        "section": "nothing", "expert": "<script>", "sql": "drop table run",
    }  # fmt: skip
    app = open_app(finished_path.parent, file, **bad)
    assert app.session_state["run"] == "synthetic"
    assert_charts(app, file)


def test_a_link_restores_the_view(open_app: Opener, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, "first")
    synthetic.finished(tmp_path, "second")
    app = open_app(tmp_path, "views/tokens.py", run="first", domain="deutsch", sequence="4", layer="3", token="7")
    assert app.session_state["run"] == "first"
    assert app.session_state["sequence"] == 4
    assert app.session_state["layer"] == "3"
    assert "Experts of the token at position 7" in [element.value for element in app.subheader]
    assert charts(app)[0]["layout"]["title"]["text"].startswith("Experts of layer 3")


def test_choosing_another_run_changes_the_page(open_app: Opener, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, "large", sequences=12)
    synthetic.finished(tmp_path, "small", sequences=3)
    app = open_app(tmp_path, run="large")
    assert app.metric[0].value == f"{12 * synthetic.TOKENS:,}"
    app.sidebar.selectbox(key="run").select("small").run()
    assert not app.exception
    assert app.metric[0].value == f"{3 * synthetic.TOKENS:,}"


def test_a_domain_changes_the_figures(open_app: Opener, finished_path: Path) -> None:
    app = open_app(finished_path.parent, "views/routing.py")
    before = charts(app)[0]["data"][0]["z"]
    app.selectbox(key="domain").select("code").run()
    assert not app.exception
    assert charts(app)[0]["data"][0]["z"] != before
    assert "code" in charts(app)[0]["layout"]["title"]["text"]


def test_a_run_that_vanishes_or_is_renamed_is_explained(open_app: Opener, tmp_path: Path) -> None:
    synthetic.finished(tmp_path, "here")
    synthetic.finished(tmp_path, "other")
    app = open_app(tmp_path, run="here")
    store.Catalog(tmp_path).rename("here", "elsewhere")
    app.run()
    assert not app.exception
    assert "No run named" in texts(app)
    assert app.session_state["run"] in ("other", "elsewhere")
    store.Catalog(tmp_path).delete("other")
    store.Catalog(tmp_path).delete("elsewhere")
    app.run()
    assert not app.exception
    assert "moescope demo" in [code.value for code in app.code]


def test_a_damaged_or_locked_run_is_a_sentence(open_app: Opener, tmp_path: Path) -> None:
    (tmp_path / "damaged.duckdb").write_bytes(b"this is no database at all")
    app = open_app(tmp_path)
    for file in FILES:
        app.switch_page(file).run()
        assert not app.exception
        assert "cannot be read" in texts(app)


def test_a_replaced_run_is_shown_anew(open_app: Opener, tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path, sequences=3)
    app = open_app(tmp_path)
    assert app.metric[1].value == "3"
    other = synthetic.finished(tmp_path / "new", sequences=6)
    other.replace(path)
    app.run()
    assert app.metric[1].value == "6"


def test_several_stores_at_once(open_app: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    synthetic.finished(tmp_path / "a", "one")
    synthetic.finished(tmp_path / "b", "two")
    app = open_app(Path(f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}"))
    assert set(app.sidebar.selectbox(key="run").options) == {"one", "two"}


def test_the_pages_have_no_sql_and_no_formulas() -> None:
    for file in (ROOT / "views").glob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert "numpy" not in source, file.name
        assert ".query(" not in source, file.name
        assert len(source.splitlines()) <= 220, file.name
