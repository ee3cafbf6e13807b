"""``moescope plan --bits``: widths on the terminal, what bits go with, and the presets that ``rank`` takes for them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

import planner
import store
from app.cli import main
from app.commands.rank import _takes
from app.frames import compress as frames
from compressor.plan import bits_after, stored_bits
from planner.presets import DEFAULT_QUANTIZER, PRESETS
from sample_data import RUN


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copyfile(RUN, folder / "sample.duckdb")
    return folder


def _ask(directory: Path, *more: str) -> list[str]:
    return ["plan", "sample", "--store", str(directory), *more]


def test_widths_are_printed_layer_by_layer(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_ask(directory, "--bits", "3", "--set", "granularity=expert")) == 0
    out = capsys.readouterr().out
    with store.open_run(directory / "sample.duckdb") as run:
        plan = planner.make(run, preset=DEFAULT_QUANTIZER, bits=3.0, granularity="expert")
    assert f"{DEFAULT_QUANTIZER}, 3 bits, packed" in out and "removes" not in out
    assert re.search(rf"bits of an expert's weight, as stored +{plan.estimate.bits:.4g}\n", out)
    own = {key[2]: entry.up for key, (entry, _) in bits_after(plan).items() if key[0] == 2}
    counts = Counter(own.values())
    listed = ", ".join(f"{counts[width]} x {width}" for width in (2, 3, 4, 8) if counts[width])
    mean = sum(stored_bits(width, inputs=128) for width in own.values()) / 16
    (row,) = frames.widths(plan).filter(label="2").select("experts", "bits").rows()
    assert row == (listed, pytest.approx(mean))
    assert [line.split("  ") for line in out.splitlines() if line.startswith("2  ")] and f"2      {listed}" in out
    why = frames.units(plan).filter(layer=2, expert=5)["why"][0]
    assert why.startswith(f"{own[5]} bits; place ")


def test_what_a_cut_leaves_is_shown_twice(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--preset", "reap", "--share", "25%", "--bits", "4", "--quantizer", "uniform_bits"]
    assert main(_ask(directory, *asked)) == 0
    out = capsys.readouterr().out
    assert "reap+uniform_bits, 25 %, 4 bits, uniform, packed" in out
    assert "12 x 3" in out and "highest_cut" in out


def test_projections_and_dense_plans_show_what_widths_are_worth(directory: Path) -> None:
    with store.open_run(directory / "sample.duckdb") as run:
        whole = planner.make(run, preset="random_bits", bits=3.0, granularity="projection", seed=3)
        dense = planner.make(run, preset="pmq", bits=2.5)
        cut = planner.make(run, preset="reap", share=0.25)
    entry, _ = bits_after(whole)[0, 0, 0, "routed"]
    assert len({entry.gate, entry.up, entry.down}) > 1
    assert f"16 x gate {entry.gate} up {entry.up} down {entry.down}" in frames.widths(whole)["experts"].to_list()
    assert 2.3 < frames.widths(dense)["bits"].mean() <= 2.5 and dense.estimate.bits == 16  # type: ignore[operator]
    assert frames.widths(cut).is_empty()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bits", "x"), "'x' is no number of bits"),
        (("--bits", "0"), "must lie between 0 and 64"),
        (("--bits", "nan"), "must lie between 0 and 64"),
        (("--bits", "2"), "2 bits per weight cannot be met"),
        (("--bits", "3", "--quantizer", "reap"), "give one of the two"),
        (("--share", "0.25", "--quantizer", "pmq"), "to how many bits?"),
        (("--share", "0.25", "--bits", "4", "--quantizer", "ean"), "'ean' does not quantize"),
        (("--preset", "pmq", "--share", "0.25"), "'pmq' removes nothing"),
        (("--preset", "reap", "--bits", "3"), "a share to remove or a memory budget"),
    ],
)
def test_mistakes_end_in_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    try:
        code = main(_ask(directory, *more))
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and "Traceback" not in captured.err


def test_bits_reach_the_planner_as_json(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--preset", "error_bits", "--memory", "1.7MB", "--set", "widths=[2,3]", "--json"]
    assert main(_ask(directory, *asked)) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["steps"][0]["form"] == "packed" and plan["target"]["bits"] is None
    assert {one["up"] for layer in plan["steps"][0]["layers"] for one in layer["experts"]} == {2, 3}


def test_rank_takes_the_presets_that_can_use_what_was_asked() -> None:
    def steps(**asked: float) -> set[str]:
        options = argparse.Namespace(**{"share": None, "memory": None, "bits": None, **asked})
        return {one.step for one in PRESETS if _takes(one, options)}

    every = {one.step for one in PRESETS}
    assert steps(bits=3.0) == {"quantize"}
    assert steps(memory=10**6) == every
    assert steps(share=0.25) == steps(share=0.25, bits=3.0) == steps(memory=10**6, bits=3.0) == every - {"quantize"}
