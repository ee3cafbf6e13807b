"""``moescope plan`` with a share and a memory budget: what the share leaves gets the bits that fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.cli import main
from app.frames.compress import key_figures
from compressor.plan import Plan

RUNS = Path(__file__).parents[2] / "sample_data" / "runs"
ASKED = ("--preset", "camera_p", "--share", "0.25", "--memory", "3MiB")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copy(RUNS / "sample.duckdb", tmp_path)
    return tmp_path


def test_what_a_share_leaves_gets_the_bits_that_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "plan.json"
    wanted = [*ASKED, "--form", "uniform", "--quantizer", "error_bits", "-o", str(out)]
    assert main(["plan", "sample", *wanted, "--store", str(place), "--json"]) == 0
    plan = Plan.parse(json.dumps(json.loads(capsys.readouterr().out)["plan"]), "the answer")
    assert [step.step for step in plan.steps] == ["slim", "quantize"]
    estimate = plan.estimate
    assert estimate.expert_parameters_after == round(0.75 * estimate.expert_parameters)
    after = 2 * estimate.expert_parameters - estimate.bytes_saved  # the checkpoint keeps 2 bytes per weight
    assert 0.9 * (3 << 20) < after <= 3 << 20
    assert after * 8 == pytest.approx(estimate.bits * estimate.expert_parameters_after, rel=1e-6)


def test_key_figures_say_what_a_plan_is_predicted_to_cost(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "plan.json"
    assert main(["plan", "sample", "--bits", "3", "-o", str(out), "--store", str(place)]) == 0
    shown, plan = capsys.readouterr().out, Plan.load(out)
    price = plan.estimate.prediction
    assert price is not None and price.low < price.kl < price.high
    row = next(row for row in key_figures(plan).to_dicts() if row["figure"].startswith("predicted KL"))
    assert row["figure"].endswith(f"({price.coverage:.0%} interval)".replace("%", " %"))
    assert row["after"] == f"{price.kl:.3g} ({price.low:.3g} to {price.high:.3g})" and row["after"] in shown
    assert row["change"] == "from the run's sums"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--quantizer NAME"),
        (("--bits", "3"), "--quantizer NAME"),
        (("--bits", "3", "--quantizer", "error_bits"), "give one of both"),
    ],
)
def test_two_budgets_that_cannot_be_met_together_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(["plan", "sample", *ASKED, *more, "--store", str(place)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
