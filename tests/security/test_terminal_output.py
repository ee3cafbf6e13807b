"""Text from data in a terminal: shown, never obeyed."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import synthetic

from app.cli import main
from app.terminal import Terminal, guarded_output
from app.text import progress_line

EVIL = "\x1b[31mred\x1b]0;title\x07\rover\u202egnp.exe\x9b2J"
BAD = ("\x1b", "\x07", "\u202e", "\x9b", "\rover")


class Tty(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_it_is_told_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tty = Tty()
    monkeypatch.setattr(sys, "stdout", tty)
    with guarded_output():
        print("a\tb\nc", EVIL)
        print("\rprogress", end="")
    assert tty.getvalue().startswith("a\tb\nc \\x1b[31mred") and tty.getvalue().endswith("\n\rprogress")
    assert not any(bad in tty.getvalue() for bad in BAD)
    assert sys.stdout is tty
    assert Terminal(tty).isatty()


def test_a_pipe_gets_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with guarded_output():
        print(EVIL, end="")
    assert pipe.getvalue() == EVIL


def test_commands_and_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic, "HOSTILE", EVIL)
    path = str(synthetic.finished(tmp_path, "evil", hostile=True, sequences=8))
    for command in (
        ["place", path, "--devices", "4"],
        ["show", path],
        ["show", path, "balance"],
        ["runs", "--store", str(tmp_path)],
    ):
        tty = Tty()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", tty)
            assert main(command) == 0
        assert "red" in tty.getvalue() or command[-1] == "balance"
        assert not any(bad in tty.getvalue() for bad in BAD), command
    plan = tmp_path / "p\x1b[2J.json"
    plan.write_text("{}", encoding="utf-8")
    capsys.readouterr()
    assert main(["apply", str(plan), str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said and len(said.splitlines()) == 1 and not any(bad in said for bad in BAD)
    assert not any(bad in progress_line(EVIL) for bad in BAD)
