"""``moescope query``: answers in every form, several runs, limits, and mistakes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import polars as pl
import pytest
import synthetic

from app.cli import main
from app.frames.plain import flat, records

SUM = "select layer, sum(tokens) as tokens from expert_load group by layer order by layer"


def test_answers_in_every_form(finished_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished_path)
    assert main(["query", run, SUM, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert main(["query", run, SUM, "--csv"]) == 0
    assert pl.read_csv(io.StringIO(capsys.readouterr().out)).to_dicts() == rows
    target = tmp_path / "a.parquet"
    assert main(["query", run, SUM, "-o", str(target)]) == 0
    assert pl.read_parquet(target).to_dicts() == rows


def test_several_runs_limits_and_the_question_from_a_pipe(
    finished_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic.finished(tmp_path, "other", metrics=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("from layer order by layer, run"))
    assert main(["query", str(finished_path), "other", "-", "--store", str(tmp_path), "--rows", "4", "--json"]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert len(rows) == 4 and {row["run"] for row in rows} == {"other", "synthetic"}
    assert "cut after 4 rows" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["RUN"], "give a run and a question"), (["RUN", "drop view layer"], "only one statement"),
     (["RUN", "from lyer"], 'Did you mean "layer"'), (["RUN", "select 1", "-o", "a.xls"], "csv, parquet, json"),
     (["nix", "select 1"], "nix")],
)  # fmt: skip
def test_mistakes_are_one_line(
    finished_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["query", *(str(finished_path) if word == "RUN" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_cells_tell_the_terminal_nothing(finished_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = """select chr(27) || '[2J' || chr(10) || chr(8238) as "a\rb", repeat('x', 100000) as long"""
    assert main(["query", str(finished_path), sql.replace("\r", "\x1b")]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 3 and not set(said) & set("\x1b\r\u202e")
    assert r"\x1b[2J\n\u202e" in said and r"a\x1bb" in said and len(said) < 2000
    assert main(["query", str(finished_path), sql, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["long"] == "x" * 100000


def test_examples_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", "--examples"]) == 0
    assert capsys.readouterr().out.count("-- ") >= 10


def test_any_frame_becomes_plain() -> None:
    frame = pl.DataFrame({
        "list": [[1, None], None], "struct": [{"a": [b"x"]}, None], "bytes": [b"\xff\x00", "ü".encode()],
        "number": [float("nan"), 1.5], "text": ["a" * 9, "b"], "none": [None, None],
    })  # fmt: skip
    shown = flat(frame, limit=4)
    assert shown["list"].to_list() == ["[1, …", None]
    assert shown["bytes"].to_list() == ["ff00", "ü"] and shown["text"].to_list() == ["aaaa…", "b"]
    assert flat(frame)["struct"].to_list() == ['{"a": ["x"]}', None]
    assert flat(frame).write_csv()
    first, second = json.loads(records(frame))
    assert first["number"] is None and first["list"] == [1, None] and second["bytes"] == "ü"
