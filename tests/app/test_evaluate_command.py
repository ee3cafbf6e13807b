"""``moescope evaluate`` from plan to verdict on the sample model, and its mistakes in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import compressor
import store
from app.cli import main
from app.frames import evaluation as frames
from compressor.plan import DropLayer, DropStep, Plan
from moescope.errors import StoreError
from profiler import load_model, load_tokenizer
from profiler.capture.provenance import fingerprint
from profiler.corpus import open_corpus
from tests.compressor import edit_plans

SAMPLE = Path(__file__).parents[2] / "sample_data"
MODEL = SAMPLE / "model"
GONE = {layer: (1, 2 + layer, 14) for layer in range(6)}
DATA = ["--tokens", "1200", "--sequence-length", "96", "--new-tokens", "4", "--skip", "speed"]
SPEED = ["--skip", "speed,generation,probes"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Three experts of every layer go."""
    model = load_model(MODEL)
    source = edit_plans.source(model).model_copy(update={"fingerprint": fingerprint(model)})
    layers = tuple(DropLayer(layer=layer, experts=experts) for layer, experts in GONE.items())
    return edit_plans.plan(source, DropStep(method="test", layers=layers))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> Path:
    """A folder with the smaller model, texts, and a copy of the sample's run."""
    folder = tmp_path_factory.mktemp("evaluate")
    compressor.apply(plan, source=MODEL, destination=folder / "small")
    for name in ("german", "arithmetic"):
        shutil.copy(SAMPLE / "texts" / f"{name}.jsonl", folder)
    (folder / "runs").mkdir()
    shutil.copy(SAMPLE / "runs" / "sample.duckdb", folder / "runs")
    return folder


def command(place: Path, *more: str, model: str = "small", against: Path = MODEL) -> list[str]:
    texts = [str(place / "german.jsonl"), str(place / "arithmetic.jsonl")]
    return ["evaluate", str(place / model), "--against", str(against), "--data", *texts, *DATA,
            "--store", str(place / "runs"), *more]  # fmt: skip


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """The document of an evaluation; it lies beside the run."""
    assert main(command(place, "--beside", "sample", "-o", str(place / "found.json"), "--json")) == 0
    found: dict[str, Any] = json.loads((place / "found.json").read_text())
    return found


def test_what_dropping_experts_costs(place: Path, plan: Plan, done: dict[str, Any]) -> None:
    assert done["plan"] == plan.digest and done["held_out"] is True
    assert done["model"]["name"] == "small" and done["base"]["name"] == "model"
    assert done["base"]["fingerprint"] == plan.source.fingerprint
    assert done["notes"] == [note for note in done["notes"] if "too few" in note]  # the plan fits the base
    assert done["divergence"]["kl"]["low"] > 0.05 and done["perplexity"]["ratio"]["low"] > 1
    assert set(done["divergence"]["per_domain"]) == {"german", "arithmetic"}
    assert {row["layer"]: row["forced"]["value"] > 0.02 for row in done["routing"]["layers"]} == dict.fromkeys(
        GONE, True
    )
    # In front of the first layer nothing has changed: who is still there is chosen again, but for ties in bfloat16.
    assert done["routing"]["layers"][0]["free"]["value"] < 0.01
    assert done["size"]["base"]["experts_per_layer"] == [16] * 6
    assert done["size"]["model"]["experts_per_layer"] == [13] * 6
    assert done["size"]["model"]["file_bytes"] < done["size"]["base"]["file_bytes"]
    assert done["generation"]["prompts"] > 0 and done["speed"] is None
    paths = store.list_evaluations(place / "runs" / "sample.duckdb", "evaluation")
    assert [store.read_evaluation(path) for path in paths] == [done]


def test_frames_hold_what_the_document_says(place: Path, done: dict[str, Any]) -> None:
    domains = frames.domains(done)
    assert domains["domain"].to_list()[0] == "all" and set(domains["domain"]) == {"all", "german", "arithmetic"}
    assert domains["kl"][0] == done["divergence"]["kl"]["value"]
    assert domains["ratio"][0] == pytest.approx(domains["model"][0] / domains["base"][0])
    assert frames.layers(done)["forced"].to_list() == [row["forced"]["value"] for row in done["routing"]["layers"]]
    assert frames.probes(done)["probe"].to_list() == [one["name"] for one in done["probes"]]
    generation = {row["measure"]: row for row in frames.generation(done).to_dicts()}
    assert generation["length, tokens"]["model"] <= 4
    assert generation["perplexity of the base on it (ratio)"]["base"] >= 1
    assert frames.sizes(done)["ratio"].drop_nulls().max() <= 1.0
    assert not len(frames.benchmarks(done))
    with store.open_run(place / "runs" / "sample.duckdb") as run:
        rows = frames.evaluations(run)
    assert rows.row(0, named=True) == frames.summary(done)
    for broken in ({**done, "divergence": None}, {**done, "divergence": {**done["divergence"], "kl": 1}}):
        with pytest.raises(StoreError, match="damaged"):
            frames.domains(broken)


def test_the_verdict_comes_first(place: Path, done: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = store.list_evaluations(place / "runs" / "sample.duckdb")
    assert main(command(place)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(done["verdict"])
    for word in ("arithmetic", "copying", "repeated 4-grams", "forced", "weights in files, MiB"):
        assert word in captured.out
    assert "divergence 100%" in captured.err and "generation 100%" in captured.err
    assert store.list_evaluations(place / "runs" / "sample.duckdb") == before


def test_layers_of_their_own_are_loaded_by_the_backend(place: Path, plan: Plan) -> None:
    step = DropStep(method="test", form="per_layer", layers=(DropLayer(layer=2, experts=(0, 3)),))
    ragged = edit_plans.plan(plan.source, step)
    compressor.apply(ragged, source=MODEL, destination=place / "ragged")
    file = place / "ragged.json"
    assert main(command(place, *SPEED, "-o", str(file), "--json", model="ragged")) == 0
    found = json.loads(file.read_text())
    assert found["size"]["model"]["experts_per_layer"] == [16, 16, 14, 16, 16, 16]
    forced = [row["forced"]["value"] for row in found["routing"]["layers"]]
    assert forced[2] > 0 and sum(forced) == forced[2]
    agreement = [row["agreement"]["value"] for row in found["routing"]["layers"]]
    assert agreement[:2] == [1.0, 1.0]


def test_dropped_layers_are_numbered_as_in_the_source(place: Path, plan: Plan) -> None:
    shallow = edit_plans.plan(plan.source, DropStep(method="test", decoder_layers=(4,)))
    compressor.apply(shallow, source=MODEL, destination=place / "shallow")
    file = place / "shallow.json"
    assert main(command(place, *SPEED, "-o", str(file), "--json", model="shallow")) == 0
    routing = json.loads(file.read_text())["routing"]
    assert routing["dropped_layers"] == [4] and [row["layer"] for row in routing["layers"]] == [0, 1, 2, 3, 5]
    assert [row["agreement"]["value"] for row in routing["layers"][:4]] == [1.0] * 4
    assert routing["layers"][4]["agreement"]["value"] < 1


def test_the_text_of_the_plan_is_not_held_out(place: Path, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [place / "german.jsonl", place / "arithmetic.jsonl"]
    seen = open_corpus(texts, tokenizer=load_tokenizer(MODEL), sequence_length=96, token_budget=1200)
    provenance = plan.provenance.model_copy(update={"corpus": seen.sha256})
    shutil.copytree(place / "small", place / "overfit")
    plan.model_copy(update={"provenance": provenance}).save(place / "overfit" / "moescope_plan.json")
    assert main(command(place, *SPEED, model="overfit")) == 0
    words = capsys.readouterr().out
    assert words.startswith("Not on held-out text, so the damage is understated: ")
    assert "The text is the very text that the plan or run was made from, not held-out text." in words


@pytest.mark.parametrize("same", [True, False])
def test_files_that_the_run_has_read_are_noted(
    place: Path, same: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(SAMPLE.parent)  # the run names its files from here
    text = SAMPLE / "texts" / "german.jsonl" if same else place / "german.jsonl"
    arguments = ["evaluate", str(MODEL), "--against", str(MODEL), "--data", str(text), *DATA, *SPEED]
    before = store.list_evaluations(place / "runs" / "sample.duckdb")
    assert main([*arguments, "--beside", "sample", "--store", str(place / "runs"), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any(note.startswith(f"The run has read from {text} too") for note in notes) == same
    for path in {*store.list_evaluations(place / "runs" / "sample.duckdb")} - {*before}:
        path.unlink()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--skip", "nothing"], "--skip nothing: there are routing, generation, probes, speed"),
        (["--beside", "simple"], "did you mean sample"),
        (["--dtype", "int4"], "dtype 'int4' is not known"),
        (["--lm-eval", "arc_easy"], "lm-evaluation-harness is not installed: pip install lm-eval"),
        (["-o", "/nowhere/at/all.json"], "-o /nowhere/at/all.json: there is no folder"),
        (["--tokens", "96"], "the text is too short: 1 sequence, and intervals take 2 or more"),
        (["--sequence-length", "600", "--tokens", "3000"], "512"),
        (["--against", "/nowhere"], "/nowhere is no folder with a checkpoint"),
        (["--device-map", "{"], "device"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(command(place, *more)) == 2
    assert_one_line(capsys, message)


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("moescope: ")
    assert "Traceback" not in captured.err and captured.out == ""


def test_no_base_or_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(MODEL), "--data", "text.txt"]) == 2
    assert_one_line(capsys, "against what? give --against MODEL")
    assert main(["evaluate", str(MODEL), "--against", str(MODEL)]) == 2
    assert_one_line(capsys, "no corpus: give --data PATH")


def copy_of(folder: Path, model: Path = MODEL) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_other_tokenizers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy_of(tmp_path / "other") / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    first, second = words[-2:]
    numbers = content["model"]["vocab"]
    numbers[first], numbers[second] = numbers[second], numbers[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert main(command(place, against=tmp_path / "other")) == 2
    assert_one_line(capsys, "the tokenizers differ in 2 tokens, such as ")


def test_weights_that_are_no_numbers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy_of(tmp_path / "broken") / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert main(command(place, *SPEED, against=tmp_path / "broken")) == 1
    assert_one_line(capsys, "the base puts out NaN or infinity")


def test_interrupted(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from profiler.evaluation import compare

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare_generations", interrupt)
    before = sorted(place.rglob("*"))
    assert main(command(place, "-o", str(place / "never.json"), "--beside", "sample")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "moescope: interrupted"
    assert sorted(place.rglob("*")) == before
