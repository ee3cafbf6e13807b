"""Formulas, Markdown, zero bytes, turned directions and long lines in tokens, domains and the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import synthetic
from visiting import visited

from app.cli import main

MARK = "evilmark"
EVIL = f"$x^2$ ![{MARK}](http://evil.example/a.png) [{MARK}](javascript:x) <b>{MARK}</b> **{MARK}** \0\u202e\x1b[2J"
LONG = EVIL + "x" * 100_000
READ = re.compile(r"(?<!\\)(\$|!\[|\]\(|<b>|\*\*evilmark)|\u202e|\0|\x1b")
"""What Markdown, a browser or a reader's eye would obey."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that says such things wherever text is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "HOSTILE", LONG)
        return synthetic.finished(tmp_path_factory.mktemp("text"), "evil", hostile=True)


@pytest.mark.parametrize("view", ["", "tokens", "data"])
def test_pages_show_it_as_text(path: Path, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = visited(monkeypatch, path.parent, view)
    sent = 0
    for kind in (app.markdown, app.caption, app.info, app.warning, app.error, app.subheader, app.metric):
        for element in kind:
            text = str(element.value)
            sent += len(text)
            own = re.sub(r"`[^`]*`", "", text)  # inline code obeys nothing but the direction
            assert MARK not in own or not READ.search(own), own[:300]
            assert "\u202e" not in text and "\0" not in text
    assert sent < 100_000


def test_figures_and_the_terminal(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report is asked in tests/app/test_report.py."""
    assert main(["figure", str(path), "load", "-o", str(tmp_path / "f.html")]) == 0
    assert "<b>evilmark" not in (tmp_path / "f.html").read_text(encoding="utf-8")
    for command in (["show", str(path)], ["show", str(path), "balance"]):
        assert main(command) == 0
        assert MARK in capsys.readouterr().out or command[-1] == "balance"


@pytest.mark.parametrize("name", ["a\0b.html", "x" * 300 + ".html", "\ud800.html", "missing/f.html", "."])
def test_outputs_that_cannot_be_named(
    path: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["figure", str(path), "load", "-o", name]) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].isprintable()
