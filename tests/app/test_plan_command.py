"""``moescope plan``: what it prints, where it writes, what two plans do differently, and mistakes in one line."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import by_hand
import polars as pl
import pytest

import planner
import store
from app.cli import main
from app.commands.plan import memory, words
from app.frames import compress as frames
from app.frames.compress_presets import comparison, presets
from compressor.plan import Plan, Protected
from planner.presets import PRESETS
from sample_data import RUN


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run. Do not change the run."""
    folder = tmp_path_factory.mktemp("store")
    for source in RUN.parent.glob("sample*.duckdb"):
        shutil.copyfile(source, folder / source.name)
    return folder


def ask(directory: Path, *more: str) -> list[str]:
    return ["plan", "sample", "--store", str(directory), *more]


def test_a_plan_is_printed_and_kept_beside_the_run(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert main(ask(directory, "--preset", "reap", "--share", "0.25", "-o", str(file))) == 0
    out = capsys.readouterr().out
    plan = Plan.load(file)
    with store.open_run(directory / "sample.duckdb") as run:
        assert plan == planner.make(run, preset="reap", share=0.25)
    (kept,) = [path for path in store.list_plans(directory / "sample.duckdb") if plan.digest[:12] in path.name]
    assert store.read_plan(kept) == file.read_text()
    assert str(kept) in out
    assert "108,000 tokens" in out
    assert "predicted error, layers weighed" in out
    assert "capture valid" in out
    assert [line.split()[:4] for line in out.splitlines() if line[:2] == "3 "][0] == ["3", "16", "12", "4"]


def test_options_reach_the_planner(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--preset", "camera_p", "--share", "40%", "--domains", "c, german", "--form", "masked", "--no-guard"]
    assert main(ask(directory, *chosen, "--set", "alpha=0.5", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    with store.open_run(directory / "sample.duckdb") as run:
        same = planner.make(
            run, preset="camera_p", share=0.4, domains=["c", "german"], form="masked", guard=False, alpha=0.5
        )
    assert answer["digest"] == same.digest
    assert answer["plan"] == json.loads(same.text())
    assert Path(answer["path"]).read_text() == same.text()


def test_a_budget_in_bytes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(directory, "--preset", "frequency", "--memory", "6MiB", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["target"]["memory"] == 6 * 2**20
    assert plan["estimate"]["expert_parameters_after"] * 2 <= 6 * 2**20


def test_the_list_says_what_the_run_has(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(directory, "--list", "--json")) == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [preset.name for preset in PRESETS]
    assert rows["reap"]["here"] is True
    assert rows["heapr"]["here"] is False
    assert "--level gradients" in rows["heapr"]["missing"]
    assert main(ask(directory, "--list")) == 0
    assert "heapr" in capsys.readouterr().out


def test_presets_beside_each_other(directory: Path) -> None:
    with store.open_run(directory / "sample.duckdb") as run:
        known, frame = presets(run), comparison(run, share=0.25)
        assert frame["preset"].to_list() == known.filter("here")["preset"].to_list()
        reap = frame.row(by_predicate=pl.col("preset") == "reap", named=True)
        plan = planner.make(run, preset="reap", share=0.25)
        assert (reap["layer_error"], reap["experts_after"]) == (plan.estimate.layer_error, 72)
        few = comparison(run, share=0.01)
    refused = few.filter(pl.col("refused").is_not_null())
    assert "reap" in refused["preset"]
    assert "removes none" in refused.row(by_predicate=pl.col("preset") == "reap", named=True)["refused"]


def test_experts_to_fine_tune(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from planner.esft import esft

    file = tmp_path / "esft.json"
    assert main(ask(directory, "--esft", "c", "-o", str(file))) == 0
    assert "experts" in capsys.readouterr().out
    with store.open_run(directory / "sample.duckdb") as run:
        assert json.loads(file.read_text()) == esft(run, domain="c")
        assert main(ask(directory, "--esft", "c", "--share", "0.5", "--set", "score=gate", "--json")) == 0
        assert json.loads(capsys.readouterr().out) == esft(run, domain="c", score="gate", share=0.5)
    assert main(ask(directory, "--esft", "c", "--memory", "3GiB")) == 2
    assert main(ask(directory, "--esft", "c", "--set", "depth=3")) == 2
    assert "has no parameter 'depth'" in capsys.readouterr().err


def test_what_the_nearest_domain_keeps(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from planner.drop import retrieval

    assert main(ask(directory, "--nearest-to", "sample", "--share", "0.25", "--domains", "c,german", "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    with store.open_run(directory / "sample.duckdb") as run:
        patterns = retrieval.build(run, share=0.25, domains=["c", "german"])
        assert answer["digest"] == retrieval.retrieve(run, patterns).digest
    assert main(ask(directory, "--nearest-to", "sample")) == 2
    assert main(ask(directory, "--nearest-to", "nobody", "--share", "0.25")) == 2
    assert "no run 'nobody'" in capsys.readouterr().err


def test_difference_of_two_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    by_hand.dropping().save(first)
    by_hand.dropping(experts={1: (1, 3), 2: (0, 3)}).save(second)
    assert main(["plan", "--diff", str(first), str(second), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["label"], row["expert"], row["first"], row["second"]) for row in rows] == [
        ("2", 0, "kept", "dropped"),
        ("2", 2, "dropped", "kept"),
    ]
    assert main(["plan", "--diff", str(first), str(first)]) == 0
    assert "both do the same" in capsys.readouterr().out


def test_units_say_what_becomes_of_every_expert() -> None:
    dropped = frames.units(by_hand.dropping())
    assert dropped["fate"].to_list() == ["kept", "dropped", "kept", "dropped", "kept", "kept", "dropped", "dropped"]
    assert dropped["place"].to_list() == [2, 4, 1, 3, 1, 2, 3, 4]
    assert dropped["protected"].to_list() == [False, False, True, *[False] * 5]
    assert dropped["why"][2] == "protected: super expert: its outputs reach 820"
    merged = frames.units(by_hand.merging())
    assert merged["into"].to_list() == [0, 0, 2, 2] * 2
    assert merged["part"].to_list() == [0.75, 0.25, 0.5, 0.5] * 2
    assert merged["fate"].to_list() == ["kept", "merged"] * 4
    given = frames.units(by_hand.giving_up())
    assert given["fate"].to_list() == ["kept", "dropped"] * 4
    assert given["why"][1] == "its neurons go to experts that stay"
    slim = frames.units(by_hand.slimming())
    assert slim["neurons_kept"].to_list() == [0.25, *[1.0] * 7]


def test_layers_and_reasons() -> None:
    rows = frames.layers(frames.units(by_hand.dropping())).to_dicts()
    assert rows[0] == {
        "label": "1", "experts": 4, "kept": 2, "dropped": 2, "merged": 0, "protected": 1, "neurons_kept": 1.0,
        "highest_cut": 0.3, "lowest_kept": 0.5,
    }  # fmt: skip
    found = {(row["label"], row["what"]): row for row in frames.reasons(frames.units(by_hand.dropping())).to_dicts()}
    assert found["1", "dropped"]["experts"] == "1 3"
    assert found["2", "dropped"]["experts"] == "2-3"
    assert found["1", "dropped"]["why"] == "scores 0.1 to 0.3; what stays scores 0.5 and more"
    assert frames.reasons(frames.units(by_hand.merging()))["experts"].to_list() == ["1>0 3>2", "1>0 3>2"]
    assert "keep 25.0% to 25.0% of their neurons" in frames.reasons(frames.units(by_hand.slimming()))["why"]


def test_whole_layers_and_blocks() -> None:
    from compressor.plan import DropStep

    gone = by_hand.plan(DropStep(method="block_influence", decoder_layers=(1,)))
    assert frames.units(gone)["fate"].to_list() == ["dropped"] * 4 + ["kept"] * 4
    assert frames.units(gone)["why"][0] == "the whole decoder layer goes"
    assert "decoder layers" in frames.key_figures(gone)["figure"]
    silent = by_hand.plan(DropStep(method="moe_blocks", blocks=(2,)))
    assert frames.units(silent)["fate"].to_list() == ["kept"] * 4 + ["silenced"] * 4
    assert frames.reasons(frames.units(silent))["why"].to_list() == ["its MoE block puts out nothing any more"]
    assert "toy" in words(silent)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--share", "0.25", "--preset", "reep"), "did you mean 'reap'"),
        ((), "give --share 0.25 or --memory"),
        (("--share", "0.95"), "at most"),
        (("--share", "0.25", "--preset", "heapr"), "--level"),
        (("--share", "0.25", "--domains", "klingon"), "no domain 'klingon'"),
        (("--share", "0.25", "--set", "depth=3"), "no parameter 'depth'"),
        (("--share", "0.25", "-o", "/nowhere/at/all/plan.json"), "cannot be written"),
        (("--memory", "1TiB"), "nothing has to be removed"),
        (("--share", "0.25", "--form", "per_layer", "--engine", "any"), "engine transformers"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    directory: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(ask(directory, *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_no_run_and_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "of which run?" in capsys.readouterr().err
    (tmp_path / "junk.json").write_text("[]")
    assert main(["plan", "--diff", str(tmp_path / "junk.json"), str(tmp_path / "none.json")]) == 2
    assert "is no plan of moescope" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.2", "half"])
def test_shares_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "run", f"--share={text}"])
    assert stopped.value.code == 2
    assert "share" in capsys.readouterr().err


def test_sizes_of_memory() -> None:
    assert [memory(text) for text in ("3GiB", "500MB", "1.5 k", "12g", "77")] == [
        3 * 2**30, 500_000_000, 1500, 12_000_000_000, 77,
    ]  # fmt: skip
    for text in ("", "GiB", "-3GiB", "3 apples", "0", "3i"):
        with pytest.raises(argparse.ArgumentTypeError):
            memory(text)


def test_plans_of_two_domains_differ_by_their_protection() -> None:
    guard = Protected(layer=2, expert=0, reason="super expert")
    plain, guarded = by_hand.dropping(), by_hand.dropping(evidence=(by_hand.scored(guard),))
    assert frames.difference(plain, guarded).is_empty()
    assert frames.units(guarded).filter("protected").select("label", "expert").rows() == [("2", 0)]
