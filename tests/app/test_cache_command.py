"""``moescope cache`` on the bundled run: what is printed, kept, and refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import synthetic

import planner
import store
from app.cli import main
from planner.cache.study import Study
from planner.machines import as_json, machine
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions

RUN = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(RUN, folder)
    return folder


def ask(place: Path, *more: str, room: tuple[str, ...] = ("--vram", "9MiB")) -> list[str]:
    """The command, on a part of the trace."""
    return ["cache", "sample", "--store", str(place), *room, "--context", "512", "--steps", "20k", *more]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(list(arguments)) == 0
    return dict(json.loads(capsys.readouterr().out))


def study_of(content: dict[str, Any]) -> Study:
    return Study.of({name: value for name, value in content.items() if name != "paths"})


def test_the_verdict_with_all_that_it_rests_on_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place)) == 0
    printed = capsys.readouterr().out
    (path,) = store.list_plans(place / "sample.duckdb", "caching")
    found = Study.of(store.read_plan_document(path))
    assert printed.startswith(f"{found.verdict.sentence}\n")
    assert all(reason in printed for reason in found.verdict.reasons)
    assert all(f"note: {note}" in printed for note in found.notes)
    assert f"room for {found.slots} of 96 experts of 96 KiB" in printed
    for way in found.ways:
        assert f"{way.ms:.3g} ({way.low:.3g} to {way.high:.3g})" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert [row[0] for row in rows if row and row[0] in {one.domain for one in found.domains}] == [
        one.domain for one in found.domains
    ]
    assert str(path) in printed


def test_json_is_the_study(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = answer(capsys, *ask(place, "--link", "usb4", "--domains", "german,c", "--json"))
    found = study_of(content)
    assert {one.domain for one in found.domains} == {"german", "c"}
    assert json.loads(Path(content["paths"]["the study"]).read_text()) == {
        name: value for name, value in content.items() if name != "paths"
    }
    slow = {one.name: one.ms for one in found.ways}
    fast = study_of(answer(capsys, *ask(place, "--link", "pcie5x16", "--domains", "german,c", "--json")))
    assert all(one.ms < slow[one.name] for one in fast.ways if one.misses == "load")


def test_a_plan_s_widths_and_a_measured_machine(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with store.open_run(RUN) as run:
        planner.make(run, preset="uniform_bits", bits=16, widths=[4]).save(tmp_path / "plan.json")
    (tmp_path / "machine.json").write_text(as_json(machine("rtx3090", vram=9 * 2**20)))
    content = answer(
        capsys,
        *ask(
            place, "--machine", str(tmp_path / "machine.json"), "--plan", str(tmp_path / "plan.json"), "--json", room=()
        ),
    )
    assert content["machine"][0] == "rtx3090"
    assert content["memory"]["total"] == 9 * 2**20
    assert 24 * 2**10 < content["memory"]["slot"] < 32 * 2**10  # 4 bits and their scales, of 96 KiB in 16
    assert content["verdict"]["word"] == "fits"


@pytest.mark.parametrize("shared", ["m4-max", "cpu-desktop"])
def test_machines_whose_memory_is_shared(place: Path, capsys: pytest.CaptureFixture[str], shared: str) -> None:
    content = answer(capsys, *ask(place, "--machine", shared, "--json"))
    assert not any(way["misses"] == "cpu" for way in content["ways"])


def test_machines_are_listed_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--machines"]) == 0
    printed = capsys.readouterr().out
    assert "rtx4090" in printed and "pcie4x16" in printed and "nvme-gen4" in printed


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--machine", "rtx4091"], "no machine 'rtx4091': did you mean rtx4090"),
        (["--machine", "./none.json"], "machine file ./none.json cannot be read"),
        (["--link", "pcie9"], "no link 'pcie9'"),
        (["--vram", "4MiB"], "4 MiB are too small"),
        (["--vram", "much"], "'much' is no size of memory"),
        (["--context", "0"], "'0' must be a whole number above zero"),
        (["--domains", "germn"], "no domain 'germn'; it has arithmetic, c"),
        (["--plan", "none.json"], "none.json cannot be read"),
    ],
)
def test_bad_input_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str) -> None:
    try:
        code: int | str | None = main(ask(place, *more))
    except SystemExit as error:  # what the parser refuses
        code = error.code
    assert code == 2
    said = capsys.readouterr().err.splitlines()
    assert sentence in said[-1]
    assert "Traceback" not in "".join(said)


def test_runs_that_nothing_can_be_replayed_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "counts.csv").write_text("layer,expert\n" + "\n".join(f"0,{one % 8}" for one in range(99)))
    options = ImportOptions(num_experts=8, top_k=2)
    import_run("csv", tmp_path / "counts.csv", directory=tmp_path, name="counts", options=options)
    synthetic.live(tmp_path, "growing")
    for name, sentence in (
        ("counts", "holds counts and no trace"),
        ("growing", "still being collected"),
        ("nothing", "nothing"),
    ):
        assert main(["cache", name, "--store", str(tmp_path), "--other-weights", "1MiB"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert sentence in said[-1], said
    assert main(["cache", "--store", str(tmp_path)]) == 2
    assert "which run?" in capsys.readouterr().err


def test_a_run_whose_checks_failed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store.Run, "badge", store.Badge("invalid", "counts differ"))
    assert main(ask(place)) == 2
    assert "counts differ" in capsys.readouterr().err
    assert main(ask(place, "--allow-invalid")) == 0


def test_published_ways_stand_beside_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room = ("--vram", "9MiB", "--machine", "rtx3060")
    assert main(ask(place, "--beside", room=room)) == 0
    printed = capsys.readouterr().out
    for words in ("published policies with as many slots", "HOBBIT, distance corrected", "Best possible with sets",
                  "two-means", "in order of arrival", "the plane that most tokens use first"):  # fmt: skip
        assert words in printed
    content = answer(capsys, *ask(place, "--beside", "--json", room=room))
    lru = next(one for one in content["beside"]["policies"] if one["title"] == "Least recently used")
    each = content["slots"] // content["layers"]
    point = next(
        one for one in content["curves"]
        if (one["policy"], one["control"], one["slots"]) == ("lru", "observed", each)
    )  # fmt: skip
    assert lru["hit_rate"] == pytest.approx(point["rate"], abs=0.02)  # slots that do not divide go to some layers
    assert "beside" not in answer(capsys, *ask(place, "--json", room=room))
