"""The page Tokens: what can be chosen of which run, finding, parts, and what is said where something is missing."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import pytest
import synthetic
from streamlit.elements.lib import policies
from streamlit.testing.v1 import AppTest
from test_token_measures import _scored
from visiting import visited

import store
from app import exhibits
from app.figures.heatmap import expert_map
from app.frames import tokens
from moescope.errors import InputError


def _words(app: AppTest) -> str:
    kinds = (app.caption, app.info, app.warning, app.markdown, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two runs of the same text."""
    directory = tmp_path_factory.mktemp("tokens")
    synthetic.finished(directory, "one")
    synthetic.finished(directory, "two")
    return directory


@pytest.mark.parametrize(
    ("colour", "said"),
    [
        ("entropy", "divided by ln k"),
        ("margin", "The first gate weight minus the second"),
        ("cache misses", "a cache of 4 of the layer's experts"),
        ("importance", "weighted by their gate weights"),
        ("weight of the expert", "0 where it is not selected"),
        ("flips", "Part of the token's experts"),
    ],
)
def test_every_measure_has_its_words_and_its_curve(
    directory: Path, monkeypatch: pytest.MonkeyPatch, colour: str, said: str
) -> None:
    app = visited(monkeypatch, directory, "tokens", run="one", colour=colour, layer="3", expert="2", sequence="4")
    assert said in _words(app)
    assert len(app.get("plotly_chart")) == 1
    assert app.segmented_control(key="section").value == "Measure"


def test_text_is_found_and_a_bad_expression_is_a_sentence(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = visited(monkeypatch, directory, "tokens", run="one", find="text", text="本")
    assert "9 hits in 9 of 9 sequences" in _words(app)
    app.text_input(key="text").set_value("(").run()
    assert "0 hits in 0 of 9 sequences" in _words(app)
    app.toggle(key="regex").set_value(True).run()
    assert not app.exception
    assert "is no regular expression" in _words(app)
    app.text_input(key="text").set_value("never here").run()
    assert "0 hits" in _words(app)


def test_sequences_of_the_expert_and_flips_are_listed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = visited(
        monkeypatch, directory, "tokens", run="one", find="tokens of the expert", layer="3", expert="2", domain="code"
    )
    with store.open_run(directory / "one.duckdb") as run:
        ids = run.selections(domain="code", layers=[3]).ids
    assert f"takes {int((ids == 2).sum()):,} tokens in 3 sequences" in _words(app)
    app.selectbox(key="find").select("flips").run()
    assert not app.exception
    assert "0 of 240 tokens use another set of experts of layer 3 in two" in _words(app)


def test_a_long_sequence_is_shown_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PART", 32)
    synthetic.finished(tmp_path, "one")
    app = visited(monkeypatch, tmp_path, "tokens", sequence="4", token="40")
    assert "of 3 · tokens 32 to 63 of 80" in _words(app)
    app.number_input(key="part").set_value(3).run()
    assert "of 3 · tokens 64 to 79 of 80" in _words(app)
    app.number_input(key="token").set_value(2).run()
    assert "of 3 · tokens 0 to 31 of 80" in _words(app)
    app.number_input(key="sequence").set_value(5).run()
    assert not app.exception
    bad = visited(monkeypatch, tmp_path, "tokens", sequence="4", part="9")
    assert "tokens 0 to 31 of 80" in _words(bad)


def test_one_expert_per_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scored(tmp_path, top_k=1, scores=False).close()
    app = visited(monkeypatch, tmp_path, "tokens", colour="margin")
    assert "cannot be told from one gate weight" in _words(app)
    assert len(app.get("plotly_chart")) == 1
    app.selectbox(key="colour").select("cache misses").run()
    assert not app.exception


def test_a_live_run_is_read_but_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic.live(tmp_path, shards=2)
    synthetic.finished(tmp_path, "other")
    app = visited(monkeypatch, tmp_path, "tokens", run="growing", colour="entropy", find="text", text="本")
    assert "flips" not in app.selectbox(key="colour").options
    assert "6 hits in 6 of 6 sequences" in _words(app)


def test_exhibits_of_a_sequence(directory: Path) -> None:
    with store.open_run(directory / "one.duckdb") as run:
        made = exhibits.make("token-experts", run, choices={"sequence": "4", "layer": "3"})
        assert made.frame["position"].n_unique() == synthetic.TOKENS
        assert set(made.frame["label"]) == {"3"}
        for name in ("entropy", "margin", "importance", "weight", "misses"):
            shown = exhibits.make("token-measure", run, choices={"measure": name, "start": "16", "layer": "5"})
            assert shown.frame["position"].to_list() == list(range(16, synthetic.TOKENS))
            assert shown.frame["value"].null_count() == 0
        with pytest.raises(InputError, match="no sequence 77"):
            exhibits.make("token-measure", run, choices={"sequence": 77})


def test_words_are_looked_for_without_choosing_how(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = visited(monkeypatch, directory, "tokens", run="one", text="本")
    assert app.selectbox(key="find").value == "text" and "hits in" in _words(app)


def test_a_section_that_a_page_lacks_is_forgotten_in_silence(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = visited(monkeypatch, directory, "routing", section="Pairs", run="one")
    warned: list[str] = []
    monkeypatch.setattr(policies, "_shown_default_value_warning", False)
    monkeypatch.setattr(policies._LOGGER, "warning", lambda text, *_, **__: warned.append(str(text)))
    app.switch_page("views/expert.py").run()
    assert app.session_state["section"] == "Summary" and warned == []


def test_marks_do_not_widen_a_map_of_experts() -> None:
    heat = go.Heatmap(z=[[0, 1, 2], [3, 4, 5]], y=["0", "1"])
    figure = go.Figure([heat, go.Scatter(x=[2], y=["1"], mode="markers")])
    expert_map(figure, title="", labels=["0", "1"], width=3, theme="light")
    assert tuple(figure.layout.xaxis.range) == (-0.5, 2.5) and tuple(figure.layout.yaxis.range) == (1.5, -0.5)
