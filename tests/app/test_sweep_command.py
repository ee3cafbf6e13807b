"""``moescope sweep`` from checkpoint to document, going on where it was, mistakes in one line, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from app import exhibits
from app.cli import main
from app.exhibits import sweep as shown
from app.exhibits import sweep_answers as answers
from app.exhibits import sweep_studies as shown_studies
from app.frames import sweep as frames
from app.frames import sweep_studies as studies
from moescope.errors import InputError, StoreError
from profiler.sweep.study import Study
from tests.profiler.capture.tiny import tokenizer
from tests.profiler.sweep.by_router import olmoe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, one with one expert per token, a text of two domains, and a run of the first model."""
    folder = tmp_path_factory.mktemp("sweep")
    words, draw = tokenizer(), np.random.default_rng(0)
    for name, model in (("model", olmoe()), ("single", olmoe(num_experts_per_tok=1)), ("other", olmoe(num_experts=4))):
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    lines = [
        json.dumps({"text": "".join(map(chr, draw.integers(97, 122, 30))), "domain": domain})
        for _ in range(5)
        for domain in ("low <b>", "high")
    ]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = [
        "collect",
        str(folder / "model"),
        "--data",
        str(folder / "text.jsonl"),
        "--store",
        str(folder / "runs"),
    ]
    assert main([*arguments, "--name", "mine", "--dtype", "float32"]) == 0
    return folder


def command(place: Path, *more: str, model: str = "model") -> list[str]:
    common = ["--data", str(place / "text.jsonl"), "--store", str(place / "runs"), "--dtype", "float32"]
    return [
        "sweep",
        str(place / model),
        *common,
        "--tokens",
        "320",
        "--sequence-length",
        "32",
        "--batch-size",
        "4",
        *more,
    ]


RULES = ("--rule", "top_k=1,2,3", "--rule", "top_p=0.4", "--rule", "ratio=odp")
EVERY = (
    *("--redundancy", "--contrast", "--contrast-rank", "1,2", "--rerouting", "--rerouting-steps", "1"),
    *("--rerouting-sequences", "3", "--items", "text", "--prompt-tokens", "8", "--answer-tokens", "1"),
)


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """The document of a sweep that was begun with one rule, then went on to all."""
    assert main(command(place, "--rule", "top_k=2", "--against", "mine")) == 0
    assert main(command(place, *RULES, *EVERY, "--against", "mine", "-o", str(place / "found.json"))) == 0
    found: dict[str, Any] = json.loads((place / "found.json").read_text())
    return found


def test_it_goes_on_where_it_was(place: Path, done: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = store.list_evaluations(place / "runs" / "mine.duckdb", "sweep")
    assert store.read_evaluation(path) == done
    names = [f"{row['rule']}={row['value']}" for row in done["rules"]]
    assert names[0] == "top_k=2.0" and len(names) == len(set(names))
    assert any("router was trained for its own rule" in note for note in done["notes"])

    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(Study, "trial", fail)
    for part in ("contrast", "rerouting", "search"):
        monkeypatch.setattr(f"profiler.sweep.job.{part}", fail)
    assert main(command(place, *RULES, *EVERY, "--against", "mine")) == 0
    assert {**store.read_evaluation(path), "base": None} == {**done, "base": None}


def test_an_interrupt_loses_one_rule_at_most(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine.duckdb").write_bytes((place / "runs" / "mine.duckdb").read_bytes())
    real = Study.trial

    def trial(self: Study, trial: Any, **options: Any) -> Any:
        if trial.value == 3.0:
            raise KeyboardInterrupt
        return real(self, trial, **options)

    monkeypatch.setattr(Study, "trial", trial)
    again = command(place, "--rule", "top_k=1,2,3", "--against", "mine", "--store", str(tmp_path / "runs"))
    assert main(again) == 130 and "interrupted" in capsys.readouterr().err
    (path,) = store.list_evaluations(tmp_path / "runs" / "mine.duckdb", "sweep")
    assert [row["value"] for row in store.read_evaluation(path)["rules"]] == [1.0, 2.0]
    monkeypatch.setattr(Study, "trial", real)
    assert main(again) == 0
    assert [row["value"] for row in store.read_evaluation(path)["rules"]] == [1.0, 2.0, 3.0]


def test_what_is_shown(place: Path, done: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["show", "mine", "sweeps", "--store", str(place / "runs"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["trial"] for row in rows][:2] == ["none", "top_k=2"] and {row["domain"] for row in rows} == {"all"}
    whole = frames.rules(done)
    assert set(whole["domain"]) == {"all", "low <b>", "high"}
    assert set(frames.active(done)["label"]) == {"0", "1"}
    with store.open_run(place / "runs" / "mine.duckdb") as run:
        for entry in (*shown.EXHIBITS, *shown_studies.EXHIBITS):
            for theme in ("light", "dark"):
                made = entry.make(run, theme=theme)
                assert made.frame.height and made.read and made.alt and made.rests_on
                drawn = made.figure.to_json()
                assert "low <b" not in drawn and "low \\u003cb" not in drawn, entry.name
                assert made.figure.layout.height and len(made.figure.data)
        said = {name: getattr(answers, name)(run) for name in ANSWERS}
        assert all(said.values()) and all(text.endswith((".", "\\.")) for text in said.values())
        assert said["difficulty"].startswith(("Yes", "No")) and "<b>" not in said["difficulty"]
        with pytest.raises(InputError, match="has no sweep 'x'"):
            shown.costs(run, sweep="x")
        with pytest.raises(InputError, match="has not tried 'top_p=9'"):
            shown.active(run, trial="top_p=9")
        with pytest.raises(exhibits.Absent, match="no text of domain"):
            shown.costs(run, domain="none")


ANSWERS = ("costs", "difficulty", "slimmability", "redundancy", "contrast", "rerouting", "search")


def test_no_sweep_yet_names_the_command(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.duckdb").write_bytes((place / "runs" / "mine.duckdb").read_bytes())
    with store.open_run(tmp_path / "bare.duckdb") as run:
        assert frames.sweeps(run).is_empty()
        for entry in (*shown.EXHIBITS, *shown_studies.EXHIBITS):
            with pytest.raises(exhibits.Absent) as absent:
                entry.make(run)
            assert absent.value.remedy.startswith("moescope sweep MODEL")


def test_answers_are_no_where_the_interval_holds_nothing(place: Path, done: dict[str, Any], tmp_path: Path) -> None:
    run_file = tmp_path / "judged.duckdb"
    run_file.write_bytes((place / "runs" / "mine.duckdb").read_bytes())

    def said(name: str, difference: tuple[float, float, float], ahead: tuple[float, float, float]) -> str:
        document = json.loads(json.dumps(done))
        ends, far = (dict(zip(("value", "low", "high"), one, strict=True)) for one in (difference, ahead))
        document["search"]["difference"] = ends
        document["rerouting"]["conditions"]["fitted"]["change"] = ends
        document["rerouting"] |= {"against_random": far, "against_other": far}
        for row in document["contrast"]:
            for beta in row["betas"]:
                beta["difference"] = ends
        store.write_evaluation(run_file, document)
        with store.open_run(run_file) as run:
            return str(getattr(answers, name)(run))

    above, below, around = (0.1, 0.05, 0.2), (-0.1, -0.2, -0.05), (0.01, -0.1, 0.2)
    assert said("search", above, below).startswith("Yes") and said("search", around, below).startswith("No")
    assert said("contrast", above, below).startswith("Yes") and said("contrast", around, below).startswith("No")
    assert said("rerouting", below, below).startswith("Yes") and said("rerouting", around, below).startswith("No")
    assert "not clearly ahead of both controls" in said("rerouting", below, around)


@pytest.mark.parametrize(
    ("model", "more", "reason"),
    [
        ("model", ("--rule", "top_q=1"), "there are top_k"),
        ("model", ("--rule", "top_k=9"), "a layer has 8 experts"),
        ("model", ("--rule", "shared=off"), "no shared experts"),
        ("single", ("--rule", "top_p=0.5"), "none to leave out"),
        ("model", ("--rule", "ratio=odp", "--calibration", "0"), "medians need text"),
        ("model", ("--sequence-length", "600", "--tokens", "6k", "--packing"), "use --sequence-length 512"),
        ("model", ("--contrast", "--contrast-rank", "9"), "ranks experts from 1 to 8"),
        ("model", ("--rerouting", "--rerouting-layers", "7"), "no MoE layer 7"),
        ("model", ("--items", "none.jsonl"), "No such file"),
        ("model", ("--items", "text", "--prompt-tokens", "8", "--search-k", "2"), "two numbers of experts"),
        ("other", ("--against", "mine"), "is of another model"),
        ("model", ("--against", "none"), "none"),
        ("model", ("--plan", "none.json"), "none.json"),
        ("model", ("-o", "nowhere/found.json"), "there is no folder"),
    ],
)
def test_mistakes_end_in_one_line(
    place: Path, model: str, more: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "600" in more:
        (place / "long.jsonl").write_text(json.dumps({"text": "ab" * 4000}))
        more = (*more, "--data", str(place / "long.jsonl"))
    capsys.readouterr()
    assert main(command(place, *more, model=model)) == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("moescope")]
    assert len(lines) == 1 and reason in lines[0]


def test_a_damaged_document_is_named(done: dict[str, Any]) -> None:
    for read, part in ((frames.rules, "rules"), (studies.contrast, "contrast"), (studies.search, "search")):
        with pytest.raises(StoreError, match="a sweep beside the run is damaged"):
            read({**done, part: [{}] if part != "search" else {"items": 3}})
    assert isinstance(frames.difficulty(done), pl.DataFrame)
