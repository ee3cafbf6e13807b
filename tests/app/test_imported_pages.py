"""Every page on imported runs: counts without a trace, and a trace without text, weights and logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from visiting import open_section

from app.views import PAGES
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions

ROOT = Path(__file__).parents[2] / "app"
FILES = [f"views/{Path(page.file).name}" for page in PAGES]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run of counts: 3 layers x 8 experts."""
    directory = tmp_path_factory.mktemp("counts")
    generator = np.random.default_rng(0)
    lines = [f"{layer},{expert}" for layer in range(3) for expert in generator.integers(0, 8, 400).tolist()]
    (directory / "counts.csv").write_text("layer,expert\n" + "\n".join(lines))
    options = ImportOptions(num_experts=8, top_k=2)
    import_run("csv", directory / "counts.csv", directory=directory / "runs", name="counts", options=options)
    return directory / "runs"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run of a trace that has ids alone: 6 sequences of 60 tokens, 3 layers, 2 of 8 experts."""
    directory = tmp_path_factory.mktemp("bare")
    generator = np.random.default_rng(0)
    experts = np.argsort(generator.random((360, 3, 8)), axis=-1)[..., :2].astype(np.uint8)
    np.savez(directory / "bare.npz", experts=experts, offsets=np.arange(0, 361, 60), num_experts=np.int64(8))
    import_run("npz", directory / "bare.npz", directory=directory / "runs", name="bare")
    return directory / "runs"


def _visit(directory: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> tuple[AppTest, str]:
    """The page, which must not raise or show an error, and its sentences."""
    monkeypatch.setenv("MOESCOPE_STORE", str(directory))
    app = AppTest.from_file(str(ROOT / "main.py"), default_timeout=60).run()
    app.switch_page(file).run()
    assert not app.exception, app.exception[0].message
    assert not app.error
    kinds = (app.markdown, app.info, app.warning, app.caption, app.expander)
    return app, "\n".join(str(getattr(element, "value", "") or element.label) for kind in kinds for element in kind)


@pytest.mark.parametrize("file", FILES)
def test_every_page_of_imported_counts(counts: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app, words = _visit(counts, file, monkeypatch)
    assert "moescope collect" not in words and "moescope runs compute" not in words
    name = Path(file).stem
    if name in ("tokens", "local_consistency", "super_experts"):
        assert "cannot be computed from what was imported" in words
        assert not app.get("plotly_chart")
    if name == "routing":
        assert len(app.get("plotly_chart")) == 2
        confidence = open_section(app, "Confidence")
        assert "How decided the router was cannot be computed" in "".join(info.value for info in confidence.info)
    if name == "overview":
        assert "What this source cannot say: logits, order, outputs, text, trace, weights" in words
        assert "Super experts" not in [element.value for element in app.subheader]


@pytest.mark.parametrize("file", FILES)
def test_every_page_of_a_bare_trace(bare: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app, words = _visit(bare, file, monkeypatch)
    name = Path(file).stem
    if name == "tokens":
        assert "The text of the tokens cannot be computed" in words
        assert app.selectbox(key="colour").options == ["first expert", "cache misses", "importance"]
        assert len(app.get("plotly_chart")) == 1
    if name == "local_consistency":
        assert len(app.get("plotly_chart")) == 2
        assert len(open_section(app, "Layers and experts").get("plotly_chart")) == 3
    if name == "super_experts":
        assert "activations" in words and "cannot be computed from what was imported" in words
