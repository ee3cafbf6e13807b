"""``moescope route``: what it prints and keeps, biases from a file, balance, and mistakes in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import store
from app.cli import main
from compressor.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "planner"))
from test_route_plans import EXPERTS, write


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run that has router scores."""
    return write(tmp_path_factory.mktemp("store")).parent


def ask(directory: Path, *more: str) -> list[str]:
    return ["route", "known", "--store", str(directory), *more]


def test_a_rule_is_printed_and_kept_beside_the_run(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main(ask(directory, "--rule", "ratio", "--value", "0.5", "--layers", "1", "-o", str(file))) == 0
    out, plan = capsys.readouterr().out, Plan.load(file)
    assert "route by ratio 0.5, 1 layer: tiny" in out and "mean active experts" in out
    assert all(note in out for note in plan.evidence[0].notes)
    assert any(plan.digest[:12] in one.name for one in store.list_plans(directory / "known.duckdb"))


def test_biases_come_from_a_file_as_lists_or_by_expert(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "biases.json"
    file.write_text(json.dumps({"0": {"3": 0.5}, "1": [0.25, *[0] * (EXPERTS - 1)]}))
    assert main(ask(directory, "--bias", str(file), "--json")) == 0
    steps = json.loads(capsys.readouterr().out)["plan"]["steps"]
    assert [one["bias"][:4] for one in steps[0]["layers"]] == [[0, 0, 0, 0.5], [0.25, 0, 0, 0]]


def test_balance_says_what_it_was_judged_on(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(directory, "--balance", "--layers", "0")) == 0
    assert "judged on the others" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "content", "message"),
    [
        (("--rule", "top_p"), None, "--rule takes --value"),
        (("--balance", "--value", "1"), None, "--rule takes --value"),
        (("--rule", "top_k", "--value", "99"), None, "has 8 experts, not 99"),
        (("--rule", "top_p", "--value", "2"), None, "within 0..1"),
        (("--rule", "top_p", "--value", "0.5", "--layers", "x"), None, "'x' is no layer"),
        (("--rule", "top_p", "--value", "0.5", "--layers", "8"), None, "no MoE layer 8"),
        (("--rule", "top_p", "--value", "0.5", "--workers", "2"), None, "give --ray local"),
        (("--rule", "top_p", "--value", "0.5", "--ray", "nonsense"), None, "give 'local', or HOST:PORT"),
        (("--bias", "FILE"), None, "No such file"),
        (("--bias", "FILE"), "{", "FILE"),
        (("--bias", "FILE"), "[]", "takes {"),
        (("--bias", "FILE"), '{"0": ["a"]}', "takes a list of numbers"),
        (("--bias", "FILE"), '{"0": {"8": 1}}', "experts 0..7, not '8'"),
        (("--bias", "FILE"), '{"0": [1]}', "takes 8 biases"),
        (("--bias", "FILE"), '{"ü": [1]}', "is no layer"),
        (("--bias", "FILE", "--layers", "0"), '{"0": [1]}', "leave out --layers"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], content: str | None,
    message: str,
) -> None:  # fmt: skip
    file = tmp_path / "FILE"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert main(ask(directory, *(str(file) if word == "FILE" else word for word in more))) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said
