"""``moescope export``: the file, what it cannot say, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from compressor.exporters import EXPORTERS, exporter
from tests.compressor import edit_plans
from tests.compressor.bit_plans import mixed, quantizing
from tests.compressor.serving_plans import cache, deep, place

PLAN = quantizing("olmoe", mixed)
SERVED = edit_plans.plan(deep(3), cache({1: (0,), 2: (1, 2)}), place({1: range(4), 2: (3, 0, 2, 1)}))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_the_file_is_what_the_exporter_gives(plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "layers.json"
    assert main(["export", str(plan), "--to", "autoround", "-o", str(target)]) == 0
    assert target.read_text() == exporter("autoround").export(PLAN).text
    captured = capsys.readouterr()
    assert captured.out == f"{target}: written for autoround\n"
    assert "left out" not in captured.err
    assert main(["export", str(plan), "--to", "gptqmodel"]) == 0
    assert json.loads(capsys.readouterr().out)["-:.*"] == {}


def test_what_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = quantizing("olmoe", lambda layer, expert, part: 4 if layer == 1 else (2, 3)[expert % 2])
    one.save(tmp_path / "plan.json")
    words = ["export", str(tmp_path / "plan.json"), "--to", "gguf", "-o", str(tmp_path / "types.txt")]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "left out: layer 2 expert 0 (gate 2 bit, up 2 bit, down 2 bit): the experts of the layer" in captured.err
    assert captured.out.endswith("4 left out\n")
    assert main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["left_out"]) == 4


def test_engines_are_listed_with_the_step_that_they_speak_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    listed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert listed == [[one.name, one.step] for one in EXPORTERS]
    assert {step for _, step in listed} == {"quantize", "cache", "place"}
    assert main(["export", "--list", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["step"], one["suffix"]) for one in content] == [
        (one.name, one.step, one.suffix) for one in EXPORTERS
    ]


@pytest.mark.parametrize("engine", [one.name for one in EXPORTERS if one.step != "quantize"])
def test_every_engine_that_serves_gets_its_file(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SERVED.save(tmp_path / "plan.json")
    target = tmp_path / "file"
    code = main(["export", str(tmp_path / "plan.json"), "--to", engine, "-o", str(target), "--json"])
    if engine == "sglang-counts":
        assert code == 2 and "holds no counts" in capsys.readouterr().err
        return
    if engine == "ktransformers":
        assert code == 2 and "the experts of none" in capsys.readouterr().err
        return
    assert code == 0
    exported = exporter(engine).export(SERVED)
    assert target.read_bytes() == exported.content != b""
    told = json.loads(capsys.readouterr().out)
    assert told == {"path": str(target), "left_out": list(exported.left_out), "notes": list(exported.notes)}


@pytest.mark.parametrize(("engine", "suffix"), [("sglang-kt", ".pt"), ("eplb", ".npz")])
def test_binary_files_go_to_files_alone(
    engine: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SERVED.save(tmp_path / "plan.json")
    assert main(["export", str(tmp_path / "plan.json"), "--to", engine]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"the file for {engine} is binary: say where to write it, -o NAME{suffix}" in captured.err
    assert captured.err.count("\n") == 1
    target = tmp_path / f"file{suffix}"
    assert main(["export", str(tmp_path / "plan.json"), "--to", engine, "-o", str(target)]) == 0
    assert target.read_bytes()[:2] == b"PK"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give PLAN and --to ENGINE"),
        (["PLAN"], "give PLAN and --to ENGINE"),
        (["PLAN", "--to", "exllama"], "no engine 'exllama'"),
        (["nothing.json", "--to", "gguf"], "nothing.json cannot be read"),
        (["PLAN", "--to", "torchao"], "nothing of the plan can be said in the words of torchao"),
        (["PLAN", "--to", "autoround", "-o", "nowhere/file"], "nowhere/file cannot be written"),
        (["PLAN", "--to", "llama.cpp"], "the plan has no cache step"),
        (["PLAN", "--to", "sglang"], "the plan has no place step"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    plan: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *[str(plan) if word == "PLAN" else word for word in words]]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
