"""``moescope compare``: two runs in full, checkpoints against the last, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.cli import main
from app.frames import comparison
from tests.profiler.paired import EXPERTS, LAYERS, TOP_K, routed, texts, write


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one text in runs that come nearer to "last", one of another tokenizer, and one without token ids."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    tokens = texts(rng, [40] * 8)
    last, other = routed(rng, tokens), routed(rng, tokens)

    def mixed(share: float) -> list[np.ndarray]:
        return [
            np.where((np.arange(40) < 40 * share)[None, :, None], one, two)
            for one, two in zip(last, other, strict=True)
        ]

    write(folder, "early", tokens, mixed(0.25)).close()
    write(folder, "late", tokens, mixed(0.75)).close()
    write(folder, "last", tokens, last).close()
    write(folder, "silent", tokens, last, keep_text=False).close()
    write(folder, "foreign", tokens, last, pieces={token: b"x%d" % token for token in range(12)}).close()
    return folder


def answer(capsys: pytest.CaptureFixture[str], runs: Path, *arguments: str) -> Any:
    assert main(["compare", *arguments, "--store", str(runs), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def test_two_runs_in_full(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, runs, "late", "last")
    assert list(found) == list(comparison.SECTIONS)
    first, second = found["alignment"]
    assert (first["run"], second["run"], first["compared"], first["tokens"]) == ("late", "last", 8, 320)
    assert first["aligned_by"] == "token ids"
    overall = {row["measure"]: row for row in found["agreement"]}
    chance = TOP_K / EXPERTS
    assert overall["overlap"]["value"] == pytest.approx(0.75 + 0.25 * chance, abs=0.06)
    assert overall["overlap"]["chance"] == pytest.approx(chance)
    assert overall["overlap"]["popularity"] == pytest.approx(chance, abs=0.03)
    assert overall["overlap"]["low"] < overall["overlap"]["value"] < overall["overlap"]["high"]
    assert overall["exact"]["chance"] is None
    assert overall["first_choice"]["chance"] == 1 / EXPERTS
    rows = found["layers"]
    assert [row["label"] for row in rows] == [str(layer) for layer in LAYERS]
    assert np.mean([row["overlap"] for row in rows]) == pytest.approx(overall["overlap"]["value"])
    assert all(0 < row["total_variation"] <= 1 - row["overlap"] for row in rows)
    loads = [row for row in found["load"] if row["layer"] == LAYERS[0]]
    assert sum(row["selections"] for row in loads) == sum(row["other_selections"] for row in loads) == 320 * TOP_K
    assert sum(row["difference"] for row in loads) == pytest.approx(0)
    moved = 0.5 * sum(abs(row["difference"]) for row in loads)
    assert moved == pytest.approx(rows[0]["total_variation"])
    assert {row["domain"] for row in found["domains"]} == {"a", "b"}
    overlaps = [row["overlap"] for row in found["changed"]]
    assert overlaps == sorted(overlaps) and len(overlaps) == 12
    assert sum(row["occurrences"] for row in found["changed"]) == 320
    assert found["changed"][0]["text"].startswith("<")
    flipped = sum(row["flipped"] for row in found["margins"] if row["label"] == "all" and row["margin"] == "weight_gap")
    assert flipped == sum(round(row["tokens"] * (1 - row["exact"])) for row in rows)


def test_two_runs_in_a_terminal(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "late", "last", "--store", str(runs)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "What is compared",
        "Agreement by layer",
        "Token ids that agree least",
        "total_variation",
        "token ids",
    ):
        assert words in printed
    assert "\nlayer  step" not in printed


def test_checkpoints_against_the_last(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, runs, "early", "late", "last")
    assert list(found) == ["timeline", "alerts", "saturation", "notes"]
    assert {row["measure"] for row in found["timeline"]} == {"agreement"}  # these runs hold a trace and no statistics
    rows = found["saturation"]
    assert [(row["run"], row["label"]) for row in rows] == [
        (run, str(layer)) for run in ("early", "late") for layer in LAYERS
    ]
    early, late = (np.mean([row["saturation"] for row in rows if row["run"] == run]) for run in ("early", "late"))
    assert early == pytest.approx(0.25 + 0.75 * TOP_K / EXPERTS, abs=0.06)
    assert late == pytest.approx(0.75 + 0.25 * TOP_K / EXPERTS, abs=0.06)
    assert all(row["saturation_low"] < row["saturation"] < row["saturation_high"] for row in rows)
    assert {(row["tokens"], row["sequences"]) for row in rows} == {(320, 8)}
    assert main(["compare", "early", "late", "last", "--store", str(runs)]) == 0
    assert "Router saturation against last" in capsys.readouterr().out


def test_checkpoints_of_other_tokenizers_have_no_agreement(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, runs, "early", "foreign", "last")
    assert list(found) == ["timeline", "alerts", "notes"]
    assert "'foreign' and 'last' have different tokenizers" in found["notes"][-1]


def test_runs_without_token_ids_by_position(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, runs, "last", "silent", "--by-position")
    assert found["alignment"][0]["aligned_by"] == "position"
    assert {row["exact"] for row in found["layers"]} == {1.0}
    assert found["changed"] == [] and found["margins"] == []


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["last"], "compare takes two runs or more, not 1"),
        (["last", "silent"], "'silent' keeps no token ids (it was collected with --no-text); --by-position"),
        (["last", "foreign"], "different tokenizers: id 0 is '<0>' in one and 'x0' in the other (12 of 12"),
        (["last", "lost"], "no run 'lost'"),
    ],
)
def test_refusals_are_one_line_and_code_2(
    runs: Path, capsys: pytest.CaptureFixture[str], targets: list[str], message: str
) -> None:
    assert main(["compare", *targets, "--store", str(runs)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
