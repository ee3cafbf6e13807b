"""What a wheel must carry besides modules: the schema, the theme, the published values, the sample."""

from __future__ import annotations

import tomllib
from pathlib import Path

import moescope
import sample_data
from tests.conftest import LONG

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed_and_marked_as_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert listed == found
    assert {path.parent.name for path in ROOT.glob("*/py.typed")} == found - {"sample_data"}


def test_the_sample_is_whole_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in sample_data.MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) <= 16 * 2**20
    texts = sorted(sample_data.TEXTS.glob("*.jsonl"))
    assert len(texts) >= 7
    assert all(path.stat().st_size >= 100_000 for path in texts)
    bundled = list(sample_data.RUN.parent.glob(f"{sample_data.RUN.stem}*.duckdb"))
    assert len(bundled) == 2
    assert sum(path.stat().st_size for path in bundled) <= 9 * 2**20


def test_the_bundled_run_is_of_the_bundled_model() -> None:
    import store
    from profiler import load_model
    from profiler.capture.provenance import fingerprint

    with store.open_run(sample_data.RUN) as run:
        assert run.badge.status == "valid"
        assert run.info.complete
        assert run.info.tokens >= 100_000
        assert run.info.levels == "routing,activations,similarity,errors,lookahead,attention,predictions"
        assert len(run.domains) >= 7
        assert not run.metrics("srp").is_empty()
        load_dtype = run.info.dtype.removeprefix("torch.")
        assert run.info.model_fingerprint == fingerprint(load_model(sample_data.MODEL, dtype=load_dtype, device="cpu"))


def test_version() -> None:
    assert moescope.__version__.count(".") == 2


def test_the_files_that_begin_first_are_there() -> None:
    assert [name for name in LONG if not (ROOT / "tests" / name).is_file()] == []
