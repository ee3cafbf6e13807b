"""``moescope export``: the file, what it cannot say, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cli import main
from compressor.exporters import EXPORTERS, exporter
from tests.compressor.bit_plans import mixed, quantizing

PLAN = quantizing("olmoe", mixed)


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


def test_engines_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [one.name for one in EXPORTERS]
    assert main(["export", "--list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(EXPORTERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give PLAN and --to ENGINE"),
        (["PLAN"], "give PLAN and --to ENGINE"),
        (["PLAN", "--to", "exllama"], "no engine 'exllama'"),
        (["nothing.json", "--to", "gguf"], "nothing.json cannot be read"),
        (["PLAN", "--to", "torchao"], "nothing of the plan can be said in the words of torchao"),
        (["PLAN", "--to", "autoround", "-o", "nowhere/file"], "nowhere/file cannot be written"),
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
