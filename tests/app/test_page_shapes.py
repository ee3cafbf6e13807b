"""Every page, and every section of it, on runs of unusual shapes, and on files that are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import visited

from app.views import PAGES
from benchmarks.shaped_run import Shape, write

VIEWS = [Path(page.file).stem for page in PAGES]
SHAPES = {
    "one layer": Shape(layers=1, experts=8, top_k=2, tokens=2_000, traced=4),
    "top-1": Shape(layers=3, experts=8, top_k=1, tokens=2_000, traced=4),
    "94 x 384": Shape(layers=94, experts=384, top_k=8, tokens=10_000, traced=1),
    "counts only": Shape(layers=4, experts=16, top_k=2, tokens=10_000, traced=0, outputs=False),
}


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each shape, with one run."""
    folders = {name: tmp_path_factory.mktemp("shaped") for name in SHAPES}
    for name, folder in folders.items():
        write(folder, "run", SHAPES[name])
    return folders


def sections(app: AppTest) -> Iterator[AppTest]:
    """The page as it opens, then each of its other sections."""
    yield app
    (chosen,) = [one for one in app.segmented_control if one.key == "section"] or [None]
    if chosen is None:
        return
    for name in [option for option in chosen.options if option != chosen.value]:
        app.segmented_control(key="section").set_value(name).run()
        assert not app.exception, f"{name}: {app.exception[0].message}"
        yield app


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("view", VIEWS)
def test_every_section_of_every_page(
    shaped: dict[str, Path], monkeypatch: pytest.MonkeyPatch, view: str, shape: str
) -> None:
    app = visited(monkeypatch, shaped[shape], view, run="run", layer="0", expert="5")
    for drawn in sections(app):
        assert not drawn.error, [one.value for one in drawn.error]
        # A section shows something: a chart, a table, a text beside the title's badge, or the reason why there is none.
        page = drawn.main
        said = [one for one in page.markdown if "-badge[" not in one.value]
        kinds = (page.get("plotly_chart"), page.dataframe, page.info, page.warning, page.metric, page.code, said)
        assert any(len(kind) for kind in kinds)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store for each kind of damage, with a run that has it and one that has not."""
    folders = {name: tmp_path_factory.mktemp("damaged") for name in ("cut", "foreign")}
    for name, folder in folders.items():
        synthetic.finished(folder, "good", metrics=False)
        path = synthetic.finished(folder, "bad", metrics=False)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 3] if name == "cut" else b"This is no DuckDB file." * 1000)
    return folders


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_file_is_named_and_the_other_runs_still_open(
    damaged: dict[str, Path], monkeypatch: pytest.MonkeyPatch, view: str, damage: str
) -> None:
    app = visited(monkeypatch, damaged[damage], view, run="bad")
    assert app.error or app.warning
    said = " ".join(str(one.value) for one in (*app.error, *app.warning))
    assert "bad" in said
    app.selectbox(key="run").set_value("good").run()
    assert not app.exception and not app.error
