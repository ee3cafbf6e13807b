"""``moescope rank`` on the sample model: measured order, what is kept, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import planner
import store
from app.cli import main
from compressor.memory import edited
from compressor.plan import Plan
from profiler import load_model, load_tokenizer
from profiler.corpus import open_corpus
from profiler.evaluation import divergence

SAMPLE = Path(__file__).parents[2] / "sample_data"
MODEL = SAMPLE / "model"
TEXTS = [str(SAMPLE / "texts" / f"{name}.jsonl") for name in ("german", "c")]
TOKENS = ["--tokens", "1500", "--sequence-length", "96"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copy(SAMPLE / "runs" / "sample.duckdb", tmp_path)
    return tmp_path


def ask(place: Path, *more: str) -> list[str]:
    return ["rank", "sample", str(MODEL), "--data", *TEXTS, *TOKENS, "--store", str(place), *more]


def test_plans_stand_in_the_order_of_their_damage(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["frequency", "reap", "budgeted_reap"]
    out = place / "best.json"
    wanted = ["--share", "0.25", "--presets", ",".join([*names, "heapr"]), "-o", str(out), "--json"]
    assert main(ask(place, *wanted)) == 0
    answer = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    corpus = open_corpus(TEXTS, tokenizer=tokenizer, token_budget=1500, sequence_length=96)
    measured = {}
    with store.open_run(place / "sample.duckdb") as run:
        for name in names:
            plan = planner.make(run, preset=name, share=0.25)
            small = load_model(MODEL)
            with edited(small, plan):
                measured[name] = divergence(small, model, corpus.batches()).kl
    rows = answer["ranking"]
    assert [row["preset"] for row in rows] == sorted(names, key=measured.__getitem__)
    for row in rows:
        assert row["kl"] == pytest.approx(measured[row["preset"]], rel=1e-4)
        assert row["low"] < row["kl"] < row["high"]
        assert row["worst_domain"] in ("german", "c") and row["worst_kl"] >= row["kl"] * 0.99
    assert "--level gradients" in answer["refused"]["heapr"]
    assert Plan.load(out).digest == rows[0]["digest"]
    assert Path(answer["path"]).read_text() == out.read_text()


def test_without_names_all_that_save_memory_are_measured(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, "--share", "0.25", "--tokens", "300", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    found = {row["preset"]: row["form"] for row in answer["ranking"]}
    assert found["camera_p"] == found["reap"] == "uniform" and found["budgeted_reap"] == "per_layer"
    assert "saves no memory" in answer["refused"]["moe_blocks"] and "moe_blocks" not in found
    assert "random" not in found and len(found) > 15


def test_the_ranking_is_printed_with_its_reasons(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, "--share", "0.5", "--presets", "random,width")) == 0
    out = capsys.readouterr().out
    assert "worst domain" in out and "the best plan, width, is written to" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--share", "0.25", "--presets", "reep"), "did you mean 'reap'"),
        (("--share", "0.25", "--presets", "heapr"), "no preset gives a plan"),
        (("--share", "0.95", "--presets", "reap,dern"), "no preset gives a plan"),
        (("--memory", "1TiB"), "no preset gives a plan"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(ask(place, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
