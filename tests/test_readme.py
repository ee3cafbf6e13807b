"""What the README tells a new user to type works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from app.cli import parser
from sample_data import MODEL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "".join(block for block in README.split("```")[1::2] if block.startswith("\n"))
COMMANDS = [re.sub(r"\s+#.*", "", line) for line in BLOCKS.splitlines() if line.startswith("moescope ")]


def test_there_are_commands_to_check() -> None:
    assert {line.split()[1] for line in COMMANDS} >= {"inspect", "collect", "show", "dashboard"}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    parser().parse_args(shlex.split(line)[1:])


def test_the_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from profiler import load_model, load_tokenizer

    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu"), load_tokenizer(MODEL)
    batch = tokenizer(["def add(a, b):\n    return a + b\n"], return_tensors="pt")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert code[1].count("\n") <= 3
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "tokenizer": tokenizer, "batch": dict(batch)}
    exec(compile(code[1], "README.md", "exec"), names)
    assert (tmp_path / "runs" / "mine.duckdb").is_file()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("target", re.findall(r"make ([a-z-]+)", README))
def test_make_targets_exist(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
