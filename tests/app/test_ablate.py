"""``moescope ablate`` from checkpoint to verdict, its mistakes in one line, and what it leaves beside the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from app import super_experts_report
from app.cli import main
from app.frames import ablation, super_experts
from moescope.errors import StoreError
from profiler import evaluate
from tests.profiler.capture.tiny import tokenizer
from tests.profiler.planted import FIRST, PLANTED, planted_model

NAMES = ",".join(f"{layer}:{expert}" for layer, expert, _ in PLANTED)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the planted model, counting texts, and a run of it in a store. Do not change it."""
    folder = tmp_path_factory.mktemp("ablate")
    planted_model().save_pretrained(folder / "model")
    words = tokenizer()
    words.save_pretrained(folder / "model")
    generator, known = np.random.default_rng(0), len(words) - FIRST
    for name in ("seen", "held-out"):
        lines = []
        for start in generator.integers(0, known, 12):
            ids = FIRST + (start + np.arange(47)) % known
            lines.append(json.dumps({"text": words.decode(ids), "domain": "low" if start < 40 else "high"}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["collect", str(folder / "model"), "--data", str(folder / "seen.jsonl"), "--name", "planted"]
    assert main([*arguments, "--store", str(folder / "runs"), "--level", "activations,attention"]) == 0
    return folder


def command(place: Path, *more: str, data: str = "held-out.jsonl") -> list[str]:
    common = ["--store", str(place / "runs"), "--data", str(place / data), "--batch-size", "4"]
    return ["ablate", str(place / "model"), *common, *more]


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """The document of an ablation of the run's super experts; it lies beside the run."""
    options = ["--super-experts", "planted", "--controls", "2", "-o", str(place / "report.json"), "--json"]
    assert main(command(place, *options)) == 0
    found: dict[str, Any] = json.loads((place / "report.json").read_text())
    return found


def test_the_run_names_the_planted_experts(place: Path) -> None:
    with store.open_run(place / "runs" / "planted.duckdb") as run:
        for rule in ("paper", "code"):
            assert ",".join(map(str, super_experts.chosen(run, rule=rule))) == NAMES
        residual = super_experts.residual(run)
        assert residual.filter(pl.col("forming"))["layer"].to_list() == [1, 2, 3]
        sinks = super_experts.attention_sinks(run)
        assert sinks.filter(pl.col("mean") > 0.99)["layer"].to_list() == list(range(2, 12))
        assert (sinks["low"] <= sinks["mean"]).all() and (sinks["mean"] <= sinks["high"]).all()


def test_switching_super_experts_off(place: Path, done: dict[str, Any]) -> None:
    assert done["verdict"]["more_than_controls"] is True
    assert ablation.names(done["experts"]) == NAMES
    assert [Path(file).name for file in done["data"]["files"]] == ["held-out.jsonl"]
    assert [one["name"] for one in done["controls"]] == ["random"] * 2 + ["same layers"] * 2
    assert any("super experts of the run 'planted'" in note for note in done["notes"])
    paths = store.list_evaluations(place / "runs" / "planted.duckdb")
    assert [store.read_evaluation(path) for path in paths] == [done]


def test_the_summary_of_the_run_says_it(place: Path, done: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "planted", "--store", str(place / "runs")]) == 0
    assert f"switched off {NAMES}: Yes: switching off 3 experts" in capsys.readouterr().out
    assert main(["show", "planted", "--store", str(place / "runs"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ablations"] == [
        {"experts": NAMES, "verdict": done["verdict"]["sentence"]}
    ]
    assert main(["show", "planted", "ablations", "--store", str(place / "runs"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_its_perplexity_is_that_of_the_model(place: Path, done: dict[str, Any]) -> None:
    from profiler.corpus import open_corpus

    corpus = open_corpus(place / "held-out.jsonl", tokenizer=tokenizer(), batch_size=3)
    found = evaluate.perplexity(planted_model(), corpus.batches())
    assert done["base"]["perplexity"]["value"] == pytest.approx(found.value, rel=1e-4)
    assert done["base"]["per_domain"]["low"]["value"] == pytest.approx(found.per_domain["low"].value, rel=1e-4)


def test_frames_hold_what_the_document_says(place: Path, done: dict[str, Any]) -> None:
    passes = ablation.passes(done)
    assert passes["what"].to_list() == ["base", "ablated", "random", "random", "same layers", "same layers"]
    assert passes["perplexity"][1] == done["ablated"]["perplexity"]["value"]
    np.testing.assert_allclose(passes["perplexity"] / passes["perplexity"][0], passes["ratio"])
    layers = ablation.layers(done)
    assert layers["massive"].to_list() == [False] + [True] * 11
    assert (layers["sink_decay"][2:] > 0.9).all()
    assert ablation.domains(done)["domain"].to_list() in (["low", "high"], ["high", "low"])
    with store.open_run(place / "runs" / "planted.duckdb") as run:
        assert ablation.ablations(run).equals(passes)


def test_experts_by_name_are_kept_nowhere_unless_asked(
    place: Path, done: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = store.list_evaluations(place / "runs" / "planted.duckdb")
    assert main(command(place, "--experts", "5:3", "--controls", "1", "--tokens", "600")) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("No: switching off 1 expert")
    assert "same layers" in captured.out and "sink_decay" in captured.out
    assert "pass 4 of 4 (same layers) 100%" in captured.err
    assert store.list_evaluations(place / "runs" / "planted.duckdb") == before


def test_the_very_text_of_the_run_is_noted(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.json"
    arguments = ["--super-experts", "planted", "--controls", "0", "-o", str(file), "--json"]
    assert main(command(place, *arguments, data="seen.jsonl")) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("not held-out text" in note for note in notes)
    store_path = place / "runs" / "planted.duckdb"
    for path in store.list_evaluations(store_path):
        if "seen" in store.read_evaluation(path)["data"]["files"][0]:
            path.unlink()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "which experts? give --experts 1:68,2:92 or --super-experts RUN"),
        (["--experts", "nine"], "expert 'nine' is not LAYER:EXPERT"),
        (["--experts", "1:99"], "layer 1 has no expert 99: it has 0 to 63"),
        (["--experts", "1:shared"], "layer 1 has no shared experts"),
        (["--super-experts", "plantod"], "did you mean planted"),
        (["--experts", "1:2", "--beside", "nothing"], "no run 'nothing'"),
        (["--experts", "1:2", "--dtype", "int4"], "dtype 'int4' is not known"),
        (
            ["--experts", "1:2", "--tokens", "100", "--controls", "0", "-o", "/nowhere/at/all.json"],
            "-o /nowhere/at/all",
        ),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    place: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(place, "--sequence-length", "48", *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("moescope: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_no_text_or_a_run_of_another_model(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ablate", str(place / "model"), "--experts", "1:2"]) == 2
    assert "no corpus: give --data PATH" in capsys.readouterr().err
    writer = store.RunWriter.create(tmp_path, "other", store.RunInfo(model="other", num_layers=2))
    layer = {"layer": [0], "step": [0], "num_experts": [8], "top_k": [2], "module": ["layers.0.mlp.experts"]}
    writer.write_shard({"layer": layer})
    path = writer.finish()
    assert main(command(place, "--experts", "1:2", "--beside", str(path))) == 2
    assert "run 'other' is of another model (other)" in capsys.readouterr().err
    assert main(command(place, "--super-experts", str(path))) == 2
    assert "no super expert by the paper's rule; moescope show RUN output-maxima" in capsys.readouterr().err


def test_interrupted(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "token_losses", interrupt)
    assert main(command(place, "--experts", "1:2")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "moescope: interrupted"


def test_options_from_a_file(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.toml"
    file.write_text('experts = "5:3"\nbeside = "planted"\ncontrols = 0\ntokens = 600\n')
    assert main(command(place, "--config", str(file), "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["controls"] == [] and document["data"]["token_budget"] == 600
    newest = store.list_evaluations(place / "runs" / "planted.duckdb")[0]
    assert store.read_evaluation(newest) == document
    newest.unlink()


def test_the_reports_of_the_papers_code(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["show", "planted", "--store", str(place / "runs"), "--super-experts-report", str(tmp_path)]
    for _ in range(2):  # written anew, not appended to
        assert main(arguments) == 0
    assert "3 super experts" in capsys.readouterr().out
    report = json.loads((tmp_path / super_experts_report.REPORT).read_text())
    assert [list(entry) for entry in report] == [["expert_index", "layer_index", "output_max", "rank"]] * 3
    assert [(entry["layer_index"], entry["expert_index"], entry["rank"]) for entry in report] == [
        (2, 19, 1), (3, 30, 2), (1, 7, 3)]  # fmt: skip
    for layer, expert, _ in PLANTED:
        entries = json.loads((tmp_path / "outliers_info" / f"layer_{layer}.json").read_text())
        assert {entry["layer_index"] for entry in entries} == {str(layer)}
        top = max(entries, key=lambda entry: entry["output_max"])
        assert top["layer_type"] == f"mlp.experts.{expert}.down_proj"
        assert top["output_max_channel"] == 13
        assert set(top) == {"layer_index", "layer_type", "input_max", "output_max", "output_max_channel"}
        numbers = [int(entry["layer_type"].split(".")[2]) for entry in entries]
        assert numbers == sorted(set(numbers))
    assert len(list((tmp_path / "outliers_info").iterdir())) == 12


def test_a_shared_expert_stands_last_in_the_reports() -> None:
    from app.super_experts_report import _module

    assert _module("model.layers.3.mlp.experts", "shared", 0) == "mlp.shared_experts.down_proj"
    assert _module("model.language_model.layers.12.block_sparse_moe.experts", "routed", 5) == (
        "block_sparse_moe.experts.5.down_proj"
    )


def test_a_run_without_outputs_has_no_reports(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = store.RunWriter.create(tmp_path, "bare", store.RunInfo(model="toy", num_layers=2))
    writer.write_shard({"sequence": {"sequence": [0], "domain": ["code"], "tokens": [9], "prompt_tokens": [9]}})
    path = writer.finish()
    assert main(["show", str(path), "--super-experts-report", str(tmp_path / "out")]) == 2
    assert "holds no expert outputs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_document_is_an_error_of_the_store(done: dict[str, Any]) -> None:
    for broken in ({**done, "base": None}, {**done, "layers": [{"layer": "x"}]}, {**done, "experts": [{"l": 1}]}):
        with pytest.raises(StoreError, match="is damaged"):
            ablation.passes(broken)
            ablation.layers(broken)
