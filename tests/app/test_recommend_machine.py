"""``moescope recommend`` for a machine: what is printed, kept and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic

import store
from app.cli import main
from app.commands.machines import list_machines
from app.frames.serving import offers, told
from compressor.plan import CacheStep, Plan
from planner.cache import trials
from planner.machines import DISKS, LINKS, MACHINES, as_json, machine
from planner.serving import Serving, serving
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions

SAMPLE = Path(__file__).parents[2] / "sample_data"
MODEL = SAMPLE / "model"
SMALL = ("--vram", "6MiB", "--context", "512", "--machine", "rtx3060")
MIB = 2**20


@pytest.fixture(autouse=True)
def less_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "PAIRS", ((8, 8), (4, 4), (4, 2)))
    monkeypatch.setattr(trials, "MIXED", ())
    assert serving.__kwdefaults__ is not None
    monkeypatch.setitem(serving.__kwdefaults__, "steps", 20_000)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    shutil.copy(SAMPLE / "runs" / "sample.duckdb", tmp_path)
    return tmp_path


def ask(place: Path, *more: str, run: str = "sample") -> list[str]:
    return ["recommend", run, "--store", str(place), *more]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that says why; nothing is printed beside it."""
    try:
        code = main(list(arguments))
    except SystemExit as exit_:  # of argparse, whose usage comes first
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("moescope") and "Traceback" not in err
    if "usage:" not in err:
        told = [one for one in err.replace("\r", "\n").splitlines() if one.strip() and not one.strip().startswith("[")]
        assert told == [line]
    return line


def kept(place: Path, kind: str = "plan") -> list[Path]:
    return store.list_plans(place / "sample.duckdb", kind)


def test_the_answer_is_one_screen_and_is_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = place / "best.json"
    assert main(ask(place, *SMALL, "--ram", "32GiB", "--link", "pcie3x16", "-o", str(copy))) == 0
    out = capsys.readouterr().out
    assert out.startswith("serve: NVIDIA GeForce RTX 3060 12 GB, 6 MiB: ")
    for words in ("keys and values", "left for experts", "tokens/s", "slowest domain", "not measured here",
                  "the advice is written to", "the best plan is written to", "a copy of it is written to",
                  "moescope export PLAN"):  # fmt: skip
        assert words in out
    (plan,), (document,) = kept(place), kept(place, "serving")
    found = Serving.of(store.read_plan_document(document))
    assert Plan.load(plan).digest == Plan.load(copy).digest == found[0].digest
    assert (found[0].target.vram, found[0].target.ram) == (6 * MIB, 32 * 2**30)
    narrow = any(step.step == "quantize" for step in found[0].steps)
    assert ("moescope apply PLAN MODEL" in out) == narrow
    for line in found.reasons:
        assert line in out
    assert main(["show", "sample", "plans", "--store", str(place)]) == 0
    assert found[0].digest in capsys.readouterr().out


def test_json_is_the_advice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, *SMALL, "--json", "--quality", "1e-6")) == 0
    content = json.loads(capsys.readouterr().out)
    paths = content.pop("paths")
    assert Serving.of(content).content() == content == store.read_plan_document(Path(paths["the advice"]))
    assert content["quality"] == 1e-6 and content["offers"][0]["kl"] == 0.0
    assert Plan.load(Path(paths["the best plan"])).digest == Serving.of(content)[0].digest


def test_the_table_has_a_row_for_every_offer(place: Path) -> None:
    with store.open_run(place / "sample.duckdb") as run:
        found = serving(run, machine("rtx3060", vram=6 * MIB), context=512)
    table = offers(found)
    assert len(table) == len(found)
    for at, (row, one) in enumerate(zip(table.to_dicts(), found.offers, strict=True)):
        assert row["#"] == f"{at + 1}{'*' if at in found.front else ''}"
        assert row["tokens/s"] * row["ms"] == pytest.approx(1e3) and row["ms"] == one.ms and row["KL"] == one.kl
        assert [text.split(" ")[0] for text in (row["device"], row["host"], row["disk"])] == [
            str(count) if count else "" for count in one.experts
        ]
        assert row["its ms"] == max(part.ms for part in one.domains)
    printed = told(found)
    assert printed["#"].to_list() == table["#"].to_list()
    for row, one in zip(printed.to_dicts(), found.offers, strict=True):
        assert row["ms per token"] == f"{one.ms:.3g} ({one.low:.3g} to {one.high:.3g})"
        assert row["slowest domain"].startswith(f"{one.worst.domain}, ")
    assert max(map(len, printed["way"])) <= 30 < max(map(len, table["way"]))


def test_widths_are_kept_where_that_is_asked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, *SMALL, "--keep-widths", "--domains", "german,c", "--phase", "prompt")) == 0
    out = capsys.readouterr().out
    assert "as they are" in out and "bits" not in out and "no weight changes" in out and "apply" not in out
    assert Plan.load(kept(place)[0]).provenance.domains == ("c", "german")


def test_a_machine_that_holds_all_is_told_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, "--machine", "rtx4090")) == 0
    out = capsys.readouterr().out
    assert out.startswith("as it is: NVIDIA GeForce RTX 4090")
    plan = Plan.load(kept(place)[0])
    assert [step.step for step in plan.steps] == ["cache"]


def test_where_nothing_goes_no_plan_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(ask(place, *SMALL, "--ram", "2MiB", "--disk", "none", "--keep-widths", "-o", str(place / "p.json"))) == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("leave it:") and "2 MiB of host memory, and the machine has no disk for them" in out
    assert not kept(place) and not (place / "p.json").exists() and len(kept(place, "serving")) == 1


def test_with_the_model_other_weights_are_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "sample", str(MODEL), "--store", str(place), *SMALL, "--keep-widths", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    weights = sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    experts = 96 * 3 * 128 * 128 * 2
    assert content["memory"]["other"] == pytest.approx(weights - experts, rel=0.03)  # less the headers of the file
    assert not any("estimated" in note for note in content["notes"])


def test_a_measured_machine(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = replace(machine("rtx3060", vram=6 * MIB), name="mine", title="the one under the desk", measured=("link",))
    (place / "mine.json").write_text(as_json(own))
    assert main(ask(place, "--machine", str(place / "mine.json"), "--context", "512", "--keep-widths")) == 0
    assert "the one under the desk, 6 MiB" in capsys.readouterr().out
    assert Plan.load(kept(place)[0]).target.machine == "mine"


def test_the_best_plan_can_be_applied(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Narrower experts are written; where they lie is for an engine, and stays in the plan."""
    arguments = ("--vram", "5MiB", "--context", "512", "--quality", "0.02")
    assert main(ask(place, *arguments, "--json")) == 0
    content = json.loads(capsys.readouterr().out)
    plan = Serving.of({key: value for key, value in content.items() if key != "paths"})[0]
    assert [step.step for step in plan.steps] == ["quantize", "cache"]
    assert main(["apply", content["paths"]["the best plan"], str(MODEL), "-o", str(place / "narrow"),
                 "--no-check-models"]) == 0  # fmt: skip
    written = sum(path.stat().st_size for path in (place / "narrow").glob("*.safetensors"))
    before = sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    saved = plan.estimate.bytes_saved
    assert before - written == pytest.approx(saved, rel=0.02)
    capsys.readouterr()
    assert main(["export", content["paths"]["the best plan"], "--to", "hot-experts"]) == 0
    assert capsys.readouterr().out.startswith("layer,expert,count")
    cache = next(step for step in plan.steps if isinstance(step, CacheStep))
    assert cache.misses == "cpu" and sum(len(layer.pinned) for layer in cache.layers) == cache.slots


def test_plans_that_differ_in_places_alone_are_told_apart(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for vram in ("6MiB", "7MiB"):
        arguments = ("--vram", vram, "--context", "512", "--keep-widths", "-o", str(place / f"{vram}.json"))
        assert main(ask(place, *arguments)) == 0
    capsys.readouterr()
    one, other = str(place / "6MiB.json"), str(place / "7MiB.json")
    assert main(["plan", "--diff", one, other]) == 0
    out = capsys.readouterr().out
    assert "where experts lie while the model runs differs" in out and "both do the same to weights" in out
    assert main(["plan", "--diff", one, one]) == 0
    assert capsys.readouterr().out.endswith("both do the same\n")


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "--machines"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*MACHINES, *LINKS, *DISKS)) and "x 0.8" in out.replace("times", "x")
    list_machines(as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert [one["machine"] for one in content["machines"]] == list(MACHINES)
    assert len(content["links"]) == len(LINKS) + len(DISKS)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--machine", "rtx409"), "no machine 'rtx409': did you mean rtx4090"),
        (("--link", "pcie4x17"), "no link 'pcie4x17': did you mean pcie4x16"),
        (("--disk", "nvme-gen6"), "no disk 'nvme-gen6': did you mean nvme-gen"),
        (("--machine", "nowhere/machine.json"), "machine file nowhere/machine.json cannot be read"),
        (("--vram", "3MiB", "--context", "512"), "3 MiB are too small: 4.29 MiB go to other weights"),
        (("--vram", "twelve"), "--vram"),
        (("--vram", "0"), "--vram"),
        (("--vram", "6MiB", "--memory", "6MiB"), "--memory is about the size of weights"),
        (("--vram", "6MiB", "--quick"), "--curve and --quick are about the size of weights"),
        (("--vram", "6MiB", "--engine", "vllm"), "--engine is about the size of weights"),
        (("--vram", "6MiB", "--context", "0"), "--context: '0' must be a whole number above zero"),
        (("--vram", "6MiB", "--batch", "-1"), "--batch"),
        (("--vram", "6MiB", "--phase", "later"), "--phase"),
        (("--vram", "6MiB", "--quality", "0"), "must be above 0"),
        (("--vram", "6MiB", "--domains", "germn"), "no domain 'germn': did you mean 'german'"),
        (("--vram", "6MiB", "-o", "nowhere/plan.json"), "there is no folder"),
        (("--memory", "6MiB", "--keep-widths"), "--keep-widths is about serving on a machine"),
        (("--memory", "6MiB", "--context", "12"), "--context is about serving on a machine"),
        (("--memory", "6MiB", "--chunk", "16"), "--chunk is about serving on a machine"),
        ((), "--vram 12GiB"),
    ],
)
def test_what_cannot_be_asked(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, *ask(place, *arguments))
    assert not kept(place) and not kept(place, "serving")


def test_a_device_below_one_tokens_experts_names_what_would_do(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, *ask(place, "--vram", "3MiB", "--context", "512"))
    enough = line.split("give ")[1].split(" or more")[0].replace(" ", "")
    assert main(ask(place, "--vram", enough, "--context", "512", "--keep-widths")) == 0


def test_a_run_without_a_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    lines = [f"{layer},{expert}" for layer in range(3) for expert in generator.integers(0, 8, 400).tolist()]
    (tmp_path / "counts.csv").write_text("layer,expert\n" + "\n".join(lines))
    options = ImportOptions(num_experts=8, top_k=2)
    import_run("csv", tmp_path / "counts.csv", directory=tmp_path / "runs", name="counts", options=options)
    line = refusal(capsys, *ask(tmp_path / "runs", "--vram", "12GiB", run="counts"))
    assert "run 'counts' holds counts and no trace" in line


def test_a_run_that_is_still_collected_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.live(tmp_path)
    line = refusal(capsys, *ask(tmp_path, "--vram", "12GiB", run="growing"))
    assert "still being collected" in line


def test_no_run_is_no_question(capsys: pytest.CaptureFixture[str]) -> None:
    assert "of which run?" in refusal(capsys, "recommend", "--vram", "12GiB")


def test_a_progress_line_is_not_mixed_into_the_answer(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ask(place, *SMALL, "--json", "--keep-widths")) == 0
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), dict) and "serving experts" in err
