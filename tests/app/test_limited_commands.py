"""``--memory-limit`` of commands that replay and plan, and ``cache --steps all``: what is told, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.cli import main
from moescope import memory

RUN = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"
CACHE = ("--vram", "9MiB", "--context", "512")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limited")
    shutil.copy(RUN, folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("place", "--devices", "4", "--max-tokens", "1k"),
        ("plan", "--preset", "frequency", "--share", "0.25"),
        ("route", "--rule", "top_k", "--value", "1", "--max-tokens", "1k"),
        ("show", "balance"),
    ],
)
def test_the_peak_is_told_and_the_answer_stays(
    place: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    name, *more = command
    arguments = [name, "sample", *more, "--store", str(place), "--json"]
    assert main(arguments) == 0
    plain = capsys.readouterr()
    assert "peak of memory" not in plain.err
    assert main([*arguments, "--memory-limit", "64GiB"]) == 0
    limited = capsys.readouterr()
    assert limited.out == plain.out and "peak of memory: " in limited.err and " of 64 GiB" in limited.err
    assert memory.limit() is None


def test_a_limit_that_nothing_fits_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["place", "sample", "--devices", "4", "--store", str(place), "--memory-limit", "10MiB"]) == 2
    assert "a memory limit of 10 MiB is below" in capsys.readouterr().err


def test_steps_beyond_the_limit_are_refused_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "share", lambda part, most: min(most, 10_000_000))
    given = ["cache", "sample", *CACHE, "--steps", "200k", "--store", str(place)]
    assert main([*given, "--memory-limit", "64GiB"]) == 2
    said = capsys.readouterr().err
    assert "200,000 layer-steps take about" in said and "the memory limit leaves" in said and "give --steps" in said


def test_all_steps(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["cache", "sample", *CACHE, "--domains", "python", "--steps", "all", "--json", "--store", str(place)]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["asked"]["curves"] == "all tokens"
    assert found["notes"][0].startswith("Hit-rate curves, and what they are made of, are of all the trace")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--ray", "local"), "give --steps all too"),
        (("--steps", "all", "--workers", "2"), "give --ray local or --ray HOST:PORT too"),
        (("--steps", "all", "--batch", "2"), "leave out --batch and --chunk"),
        (("--steps", "all", "--ray", "127.0.0.1:1"), "no Ray answers at 127.0.0.1:1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert main(["cache", "sample", *CACHE, *more, "--store", str(place)]) == 2
    assert said in capsys.readouterr().err
