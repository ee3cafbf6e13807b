"""The page Data: questions, tables, methods and files, through Streamlit's own test runner; charts of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

from app.figures.answer import KINDS, answer_chart
from app.frames.answers import default_chart
from store import EXAMPLES


@pytest.fixture(scope="module")
def store_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data page")
    synthetic.finished(directory, "one", hostile=True)
    synthetic.finished(directory, "other", metrics=False, activations=False)
    return directory


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.caption, app.info, app.warning, app.error, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def test_a_question_is_answered_and_drawn(monkeypatch: pytest.MonkeyPatch, store_directory: Path) -> None:
    app = visited(monkeypatch, store_directory, "data", run="one")
    assert app.text_area("sql").value == EXAMPLES[0].sql.strip()
    assert app.dataframe[0].value.columns.to_list() == ["layer", "expert", "tokens"]
    app.session_state["show"] = "chart"
    app.run()
    spec = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert spec["data"][0]["type"] == "heatmap" and spec["layout"]["meta"]["pick"] == {"layer": "y", "expert": "x"}
    app.text_area("sql").set_value("select layer, step, [1, 2] as list, 'a<b'::blob as bytes from layer").run()
    assert app.session_state["chart"] == "bar" and not app.exception  # proposed anew for other columns
    app.session_state["show"] = "table"
    app.run()
    assert set(app.dataframe[0].value["bytes"]) == {"a<b"} and set(app.dataframe[0].value["list"]) == {"[1, 2]"}


def test_mistakes_limits_and_several_runs(monkeypatch: pytest.MonkeyPatch, store_directory: Path) -> None:
    app = visited(monkeypatch, store_directory, "data", run="one", sql="drop view layer")
    assert "only one statement" in app.error[0].value
    app.text_area("sql").set_value("from route").run()
    assert "Cut: these are the first 1,000 rows" in app.warning[0].value
    app.text_area("sql").set_value("select run, count(*) as rows from layer group by run").run()
    assert "run" in app.error[0].value
    app.multiselect("with").set_value(["other"]).run()
    assert set(app.dataframe[0].value["run"]) == {"one", "other"}
    app.text_area("sql").set_value("  ").run()
    assert "Write a question" in app.info[0].value and not app.exception


def test_an_example_fills_the_question(monkeypatch: pytest.MonkeyPatch, store_directory: Path) -> None:
    app = visited(monkeypatch, store_directory, "data", run="one")
    app.button_group("sql-example").set_value(EXAMPLES[1].title).run()
    assert app.text_area("sql").value == EXAMPLES[1].sql.strip()
    assert not app.button_group("sql-example").value


def test_tables_are_looked_through(monkeypatch: pytest.MonkeyPatch, store_directory: Path) -> None:
    address: dict[str, Any] = {"section": "Tables", "table": "expert_load", "where-1": "layer", "is-1": "equals"}
    app = visited(monkeypatch, store_directory, "data", run="one", **address, **{"value-1": "1"})
    assert set(app.dataframe[0].value["layer"]) == {1}
    app.text_input("value-1").set_value("many").run()
    assert "Could not convert" in app.error[0].value
    app.selectbox("is-1").set_value("matches").run()
    assert "No rows meet" in app.info[0].value
    for table in ("vocabulary", "route_chunk", "metric_vector", "omission"):
        app.selectbox("table").set_value(table).run()
        assert not app.exception, table


@pytest.mark.parametrize("section", ["Methods", "Files", "nonsense"])
def test_other_sections(monkeypatch: pytest.MonkeyPatch, store_directory: Path, section: str) -> None:
    app = visited(monkeypatch, store_directory, "data", run="other", section=section)
    if section == "Methods":
        assert "arXiv 2412.14219" in words(app) and len(app.dataframe[0].value) > 90
        app.session_state["methods"] = "not here"
        app.run()
        assert set(app.dataframe[0].value["here"]) == {"not here"}
    if section == "Files":
        assert "moescope report other -o report.html" in words(app)
        assert "moescope figure other load -o load.svg" in set(app.dataframe[0].value["command"])


def test_a_live_run_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    synthetic.live(tmp_path)
    app = visited(monkeypatch, tmp_path, "data", run="growing")
    assert len(app.dataframe[0].value)
    for section in ("Tables", "Methods", "Files"):
        app = visited(monkeypatch, tmp_path, "data", run="growing", section=section)
        assert not app.error


@pytest.mark.parametrize("kind", KINDS)
def test_charts_show_what_the_rows_say(kind: str) -> None:
    frame = pl.DataFrame({"layer": [0, 0, 1, None], "expert": [0, 1, 1, 0], "value": [1.0, -2.0, None, 4.0],
                          "name": ["<b>", "c", "<b>", None]})  # fmt: skip
    shade = "value" if kind == "heatmap" else "name"
    figure = answer_chart(frame, kind=kind, x="expert", y="layer" if kind == "heatmap" else "value", colour=shade)
    text = figure.to_json()
    assert "<b>" not in text.replace("<br>", "")
    if kind == "heatmap":
        cells = figure.data[0].z
        assert cells.shape == (3, 2) and cells[0].tolist() == [1.0, -2.0] and cells[2][0] == 4.0
    elif kind != "histogram":
        assert len(figure.data) == 3 and list(figure.data[0].customdata[0]) == [0, 0]
        assert figure.layout.meta["pick"] == {"layer": "customdata.0", "expert": "customdata.1"}
    for bad in ({"x": "nix", "y": "nix"}, {"x": "name", "y": "name"}):
        assert answer_chart(frame, kind=kind, colour="name", **bad).layout.title.text  # a sentence, no traceback
    assert answer_chart(frame.clear(), kind=kind, x="expert", y="value", colour="value").layout.annotations


def test_a_heatmap_shows_the_mean_of_rows_that_share_a_cell_and_refuses_too_many() -> None:
    frame = pl.DataFrame({"a": ["x", "x", "y"], "b": [1, 1, 2], "v": [1.0, 3.0, 5.0]})
    assert answer_chart(frame, kind="heatmap", x="a", y="b", colour="v").data[0].z[0][0] == 2.0
    many = pl.DataFrame({"a": range(700), "b": range(700), "v": range(700)})
    assert "too many" in answer_chart(many, kind="heatmap", x="a", y="b", colour="v").layout.annotations[0].text
    assert "colours" in answer_chart(many, kind="bar", x="a", y="b", colour="v").layout.annotations[0].text


def test_the_first_chart_is_one_that_can_be_drawn() -> None:
    cells = pl.DataFrame({"layer": [0, 0], "expert": [0, 1], "tokens": [3, 4]})
    assert default_chart(cells) == {"kind": "heatmap", "x": "expert", "y": "layer", "colour": "tokens"}
    curves = pl.DataFrame({"run": ["a", "b"] * 3, "layer": [0, 0, 1, 1, 2, 2], "tokens": range(6)})
    assert default_chart(curves) == {"kind": "line", "x": "layer", "y": "tokens", "colour": "run"}
    assert default_chart(pl.DataFrame({"a": ["x"], "b": ["y"]})) == {}


def test_a_column_may_be_asked_for_twice_and_hold_what_is_no_number() -> None:
    frame = pl.DataFrame({"a": [1.0, float("nan"), None], "b": [0, 0, 1], "v": [2.0, 4.0, 6.0]})
    shown = answer_chart(frame, kind="heatmap", x="a", y="b", colour="v").data[0]
    assert list(shown.x) == ["1.0", "None"] and shown.z.tolist()[0] == [2.0, 4.0] and shown.z[1][1] == 6.0
    for x, y, value in (("v", "v", "v"), ("v", "b", "v"), ("a", "a", "v"), ("b", "v", "b")):
        assert answer_chart(frame, kind="heatmap", x=x, y=y, colour=value).data[0].z.shape
