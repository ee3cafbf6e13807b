"""``moescope apply``: the sample checkpoint made smaller, stopped and taken up again; mistakes in one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import planner
import store
from app import jobs
from app.cli import main
from compressor.plan import Plan
from sample_data import MODEL, RUN

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the bundled run. Do not change the run."""
    folder = tmp_path_factory.mktemp("store")
    for source in RUN.parent.glob("sample*.duckdb"):
        shutil.copyfile(source, folder / source.name)
    return folder


@pytest.fixture(scope="module")
def plan(directory: Path) -> Path:
    with store.open_run(directory / "sample.duckdb") as run:
        return store.write_plan(run.path, planner.make(run, preset="reap", share=0.25).text())


@pytest.fixture(scope="module")
def smaller(directory: Path, plan: Path) -> Path:
    """The bundled model with a quarter of its experts gone."""
    folder = directory / "smaller"
    assert main(["apply", str(plan), str(MODEL), "-o", str(folder), "--store", str(directory)]) == 0
    return folder


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_quarter_of_the_experts_goes(smaller: Path, plan: Path, directory: Path) -> None:
    from compressor import load

    assert json.loads((smaller / "config.json").read_text())["num_experts"] == 12
    model = load(smaller)
    assert {module.num_experts for name, module in model.named_modules() if name.endswith("mlp.experts")} == {12}
    (receipt,) = (store.read_plan_document(path) for path in store.list_plans(directory / "sample.duckdb", "receipt"))
    assert receipt["plan"] == Plan.load(plan).digest
    assert receipt["bytes_after"] < receipt["bytes_before"]


def test_a_dry_run_writes_nothing(
    plan: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["apply", str(plan), str(MODEL), "-o", str(tmp_path / "out"), "--dry-run", "--store", str(directory)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "would be made" in out
    assert "nothing was written" in out
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True


def test_progress_says_bytes_speed_and_time_left(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "progress.json"
    assert main(["apply", str(plan), str(MODEL), "-o", str(tmp_path / "out"), "--progress-file", str(file)]) == 0
    said = json.loads(file.read_text())
    assert said["done_bytes"] == said["total_bytes"] > 0
    assert "writing 100%" in capsys.readouterr().err


def test_interrupted_work_is_taken_up(
    plan: Path, smaller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from app.progress import ByteProgress

    target = tmp_path / "out"
    words = ["apply", str(plan), str(MODEL), "-o", str(target)]
    told = ByteProgress.__call__

    def stop_half_way(self: ByteProgress, done: int, total: int) -> None:
        told(self, done, total)
        if done > total / 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(ByteProgress, "__call__", stop_half_way)
        assert main(words) == 130
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    assert not target.exists()
    assert main(words) == 0
    assert weights(target) == weights(smaller)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "nothing.json"}, "nothing.json cannot be read"),
        ({"plan": "junk.json"}, "is no plan"),
        ({"model": "nowhere"}, "nowhere"),
        ({"output": None}, "give -o DIR"),
        ({"output": "full"}, "full"),
        ({"progress": "nowhere/progress.json"}, "--progress-file"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    (tmp_path / "junk.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    given: dict[str, Any] = {"plan": plan, "model": MODEL, "output": "out", "progress": None, **change}
    words = ["apply", str(tmp_path / given["plan"]), str(tmp_path / given["model"])]
    words += ["-o", str(tmp_path / given["output"])] if given["output"] else []
    words += ["--progress-file", str(tmp_path / given["progress"])] if given["progress"] else []
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_plan_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import by_hand

    by_hand.dropping().save(tmp_path / "plan.json")
    assert main(["apply", str(tmp_path / "plan.json"), str(MODEL), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_killed_process_leaves_it_resumable(plan: Path, smaller: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-m", "app.cli", "apply", str(plan), str(MODEL), "-o", str(tmp_path / "out")]
    slow = "import time; from app.progress import ByteProgress as B; B.__call__ = lambda *_: time.sleep(60)\n"
    code = f"{slow}import sys; from app.cli import main; sys.exit(main({words[4:]!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob(".out*/*")):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.strip().endswith("the same command goes on where it stopped")
    assert "Traceback" not in said
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert weights(tmp_path / "out") == weights(smaller)


def test_a_job_applies_the_plan(plan: Path, smaller: Path, directory: Path) -> None:
    import time

    run = directory / "sample.duckdb"
    job = jobs.start(run, plan=plan, digest=Plan.load(plan).digest, source=MODEL, destination=directory / "by-a-job")
    end = time.monotonic() + 120
    while jobs.status(job).state == "running" and time.monotonic() < end:
        time.sleep(0.1)
    status = jobs.status(job)
    assert (status.state, status.share) == ("done", 1.0), status.log
    assert weights(directory / "by-a-job") == weights(smaller)
