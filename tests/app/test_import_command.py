"""``moescope import``: answers, one-line errors, and what it leaves in the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import store
from app.cli import main
from profiler.importers.registry import FORMATS


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """2 sequences of 6 tokens, 2 layers, 2 of 5 experts; the last expert is never used."""
    experts = np.argsort(np.random.default_rng(1).random((12, 2, 4)), axis=-1)[..., :2].astype(np.uint8)
    np.savez(tmp_path / "my trace.v1.npz", experts=experts, offsets=np.array([0, 6, 12]))
    return tmp_path / "my trace.v1.npz"


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a refused command prints."""
    assert main(["import", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_formats_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--list"]) == 0
    text = capsys.readouterr().out
    assert all(one.name in text and one.gives in text for one in FORMATS)
    assert main(["import", "--list", "--json"]) == 0
    assert [row["format"] for row in json.loads(capsys.readouterr().out)] == [one.name for one in FORMATS]


def test_a_trace_becomes_a_run_with_its_metrics(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    given = ["import", "npz", str(trace), "--num-experts", "5", "--domain", "chat", "--phase", "prompt"]
    assert main([*given, "--model-name", "mine", "--store", str(runs)]) == 0
    captured = capsys.readouterr()
    assert f"moescope show my-trace --store {runs}" in captured.out
    assert "12 tokens" in captured.err and "tokens/s" in captured.err
    run = store.open_run(runs / "my-trace.duckdb")
    assert (run.info.model, run.domains, run.layers[0].num_experts) == ("mine", ["chat"], 5)
    assert set(run.table("router_load")["phase"]) == {"prompt"}
    assert not run.metrics("normalised_load_entropy").is_empty()


def test_json_prints_nothing_else(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    given = ["import", "npz", str(trace), "--num-experts", "5", "--store", str(runs), "--name", "a"]
    assert main([*given, "--no-metrics", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"run": "a", "path": str(runs / "a.duckdb")}
    assert captured.err == ""
    assert [path.name for path in runs.iterdir()] == ["a.duckdb"]


def test_config_is_the_models(trace: Path, tmp_path: Path) -> None:
    """Not the file of options that --config means for other commands."""
    model = tmp_path / "tiny"
    model.mkdir()
    shape = {"num_hidden_layers": 3, "num_experts": 5, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    (model / "config.json").write_text(json.dumps({"model_type": "made_up", "hidden_size": 8, **shape}))
    assert main(["import", "npz", str(trace), "--config", str(model), "--store", str(tmp_path), "--name", "b"]) == 0
    run = store.open_run(tmp_path / "b.duckdb")
    assert [layer.layer for layer in run.layers] == [1, 2]
    assert (run.info.model, run.info.model_type, run.info.num_layers, run.info.hidden_size) == ("tiny", "made_up", 3, 8)


def test_mistakes_are_one_line(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_option = ("--store", tmp_path / "runs")
    largest = int(np.load(trace)["experts"].max())
    assert f"--num-experts (at least {largest + 1};" in _fails(capsys, "npz", trace, *store_option)
    assert "import takes FORMAT and PATH" in _fails(capsys, "npz")
    assert "no import format 'nope'; there are npz" in _fails(capsys, "nope", trace, *store_option)
    assert "there is no such file" in _fails(capsys, "npz", tmp_path / "none", *store_option)
    assert "out of range" in _fails(capsys, "npz", trace, "--num-experts", "2", *store_option)
    assert "there is no none" in _fails(capsys, "npz", trace, "--config", tmp_path / "none", *store_option)
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(trace.read_bytes()[:-40])
    assert "is no .npz file" in _fails(capsys, "npz", damaged, "--num-experts", "5", *store_option)
    assert "cannot name a run" in _fails(capsys, "npz", trace, "--num-experts", "5", "--name", "../up", *store_option)
    assert not (tmp_path / "runs").exists()
