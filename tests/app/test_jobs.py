"""Jobs in the background: real processes that outlive who started them, are stopped kindly, and never mistaken."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import by_hand
import pytest

import store
from app import job_runner, jobs
from app.progress import ByteProgress, Stoppable
from moescope.errors import InputError, RunError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    writer = store.RunWriter.create(tmp_path, "mine", store.RunInfo(model="toy", num_layers=2))
    writer.write_shard({"sequence": {"sequence": [0], "domain": ["code"], "tokens": [9], "prompt_tokens": [9]}})
    return writer.finish()


@pytest.fixture
def plan(run: Path) -> Path:
    return store.write_plan(run, by_hand.dropping().text())


@pytest.fixture
def waiting(run: Path) -> Iterator[Path]:
    """A plan that cannot be read until someone writes it: a job that follows it runs until it is stopped."""
    pipe = run.with_name("waiting.json")
    os.mkfifo(pipe)
    yield pipe
    for job in jobs.jobs(run):
        # One that has just begun cannot be told yet from another process: ask until it is gone.
        wait(lambda job=job: jobs.status(job).state != "running" or (jobs.stop(job) and False))  # type: ignore[misc]


def wait(check: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def begin(run: Path, plan: Path, **changes: object) -> jobs.Job:
    where = {"digest": "d" * 64, "source": run.with_name("model"), "destination": run.with_name("smaller")}
    return jobs.start(run, plan=plan, **{**where, **changes})  # type: ignore[arg-type]


def test_a_job_is_stopped_and_says_so(run: Path, waiting: Path) -> None:
    job = begin(run, waiting)
    wait(lambda: "running" in _said(job))
    assert jobs.jobs(run) == [job]
    assert jobs.status(job).state == "running"
    assert jobs.is_alive(job)
    assert jobs.stop(job)
    wait(lambda: jobs.status(job).state == "stopped")
    wait(lambda: not jobs.is_alive(job))
    assert not jobs.stop(job)
    assert "interrupted" in jobs.status(job).log


def test_a_stop_amid_clean_up_leaves_no_traceback(
    run: Path, waiting: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = begin(run, waiting)
    assert jobs.stop(job) or not jobs.is_alive(job)
    wait(lambda: not jobs.is_alive(job))

    def break_down(command: object) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            raise AttributeError("half done")

    monkeypatch.setattr("app.cli.main", break_down)
    assert job_runner.main([str(job.path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert jobs.status(job).state == "stopped"


def test_nobody_writes_to_one_folder_twice(run: Path, waiting: Path, plan: Path) -> None:
    begin(run, waiting)
    with pytest.raises(InputError, match="is writing to .*smaller already"):
        begin(run, plan, digest="e" * 64)
    begin(run, waiting, destination=run.with_name("another"))
    assert len(jobs.jobs(run)) == 2


def test_a_job_that_fails_ends_with_its_reason(run: Path, plan: Path) -> None:
    job = begin(run, plan, source=run.with_name("nothing here"), held_out=["text.jsonl"])
    wait(lambda: jobs.status(job).state != "running")
    status = jobs.status(job)
    assert (status.state, status.step) == ("failed", 1)  # the second command is not tried
    assert status.words.startswith("moescope: ")
    assert "Traceback" not in status.log


def test_what_failed_is_tried_again_from_where_it_was(run: Path, plan: Path, waiting: Path) -> None:
    job = begin(run, plan, source=run.with_name("nothing here"), held_out=["text.jsonl"])
    wait(lambda: jobs.status(job).state == "failed" and not jobs.is_alive(job))
    said = {"state": "stopped", "step": 2, "code": 130}
    store.plan_path(run, "progress", job.name).write_text(json.dumps(said))
    assert jobs.status(job).command == "evaluate"
    again = jobs.again(job)
    assert again.commands == job.commands[1:]
    wait(lambda: jobs.status(again).state != "running")
    assert (jobs.status(again).state, jobs.status(again).command) == ("failed", "evaluate")
    held = begin(run, waiting, destination=run.with_name("other"))
    with pytest.raises(InputError, match="already"):
        jobs.again(held)


def test_the_commands_are_those_of_the_terminal(run: Path, waiting: Path) -> None:
    from app.cli import parser

    job = begin(run, waiting, held_out=["code=a b.jsonl", "c.txt"])
    first, second = (parser().parse_args(list(command)) for command in job.commands)
    assert (first.command, first.plan, first.model) == ("apply", waiting, str(run.with_name("model")))
    assert (first.output, first.store) == (run.with_name("smaller"), run.parent)
    assert (second.command, second.model, second.against) == ("evaluate", job.destination, job.source)
    assert (second.data, second.beside) == (["code=a b.jsonl", "c.txt"], str(run))


def test_a_number_given_to_another_process_is_not_the_job(run: Path, waiting: Path) -> None:
    job = begin(run, waiting)
    wait(lambda: "running" in _said(job))
    jobs.stop(job)
    wait(lambda: not jobs.is_alive(job))
    store.plan_path(run, "progress", job.name).write_text(json.dumps({"state": "running", "step": 1}))
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        taken = dataclasses.replace(job, pid=other.pid)
        assert jobs.status(taken).state == "lost"
        assert not jobs.stop(taken)
        assert other.poll() is None
    finally:
        other.communicate(b"")
    assert jobs.status(dataclasses.replace(job, host="elsewhere")).state == "elsewhere"


def test_files_that_are_no_jobs_are_left_out(run: Path) -> None:
    store.write_plan(run, '{"name": "other"}', kind="job", name="one")
    store.write_plan(run, "{}", kind="job", name="two")
    assert jobs.jobs(run) == []


def test_progress_on_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, now = tmp_path / "progress.json", iter([0.0, 0.1, 2.0, 4.0])
    with ByteProgress("writing", file=file, clock=lambda: next(now)) as progress:
        assert json.loads(file.read_text())["done_bytes"] == 0
        progress(1024, 4096)  # what was there already
        progress(1536, 4096)  # too soon to be told
        assert json.loads(file.read_text())["done_bytes"] == 1024
        progress(2048, 4096)
        said = json.loads(file.read_text())
        assert (said["done_bytes"], said["bytes_per_second"], said["seconds_left"]) == (2048, 512, 4.0)
        progress(4096, 4096)
    err = capsys.readouterr().err
    assert "writing  50% 2 KiB of 4 KiB, 512 B/s, 4 s left" in err
    assert err.endswith("\n")
    with pytest.raises(InputError, match="--progress-file"):
        ByteProgress("writing", file=tmp_path / "nowhere" / "progress.json")


def test_sigterm_inside_is_an_interrupt() -> None:
    import signal

    outer = Stoppable()
    with pytest.raises(KeyboardInterrupt), outer, Stoppable() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert (outer.stopped, inner.stopped) == (True, False)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_someone_elses_process_cannot_be_stopped(run: Path, waiting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = begin(run, waiting)
    wait(lambda: jobs.is_alive(job))

    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", refuse)
        with pytest.raises(RunError, match="cannot be stopped"):
            jobs.stop(job)


def _said(job: jobs.Job) -> str:
    path = store.plan_path(job.run, "progress", job.name)
    return path.read_text() if path.exists() else ""
