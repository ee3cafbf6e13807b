"""Documents beside a run that someone has changed, and files of a run written for a spreadsheet."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import synthetic
from visiting import visited

import store
from app import exhibits, jobs
from app.exhibits import sweep_answers
from app.frames import sweep as frames
from app.frames import sweep_studies as studies
from app.frames.plain import encoded
from app.markdown import code, plain
from moescope.errors import MoescopeError, StoreError
from tests.security.test_hostile_runs import words

SWEEP = next((Path(__file__).parents[2] / "sample_data" / "runs" / "sample.evaluations").glob("sweep-*.json"))
VALUES = (None, "x", "NaN", [], {}, [1], {"a": 1}, -1, 1e308, True, 10**400, "\0<b>", [[]])
READERS = (
    *(frames.title, frames.rules, frames.active, frames.bins, frames.difficulty, frames.slimmability),
    *(studies.contrast, studies.rerouting, studies.search, studies.jaccard),
)
ANSWERS = ("costs", "difficulty", "slimmability", "redundancy", "contrast", "rerouting", "search")
EVIL_DOCUMENTS = {
    "large": b'{"a": "' + b"x" * (65 << 20) + b'"}',
    "nested": b'{"a":' * 100_000,
    "not a number": b'{"kind": "sweep", "version": NaN}',
    "binary": b"\xff\xfe\0",
    "half": b'{"kind": "\\ud800"}',
    "list": b"[1]",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    path = synthetic.finished(tmp_path_factory.mktemp("documents"), "one", metrics=False)
    store.evaluations.folder_of(path).mkdir()
    with store.open_run(path) as found:
        yield found


def sweep_of(run: store.Run) -> Path:
    return store.evaluations.folder_of(run.path) / "sweep-000000000000.json"


def places(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All places in a document; of lists the first two entries."""
    if before:
        yield before
    pairs = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    for name, part in pairs:
        yield from places(part, (*before, name))


def test_a_changed_sweep_is_damaged_or_read(run: store.Run) -> None:
    """One value of another kind, or one that is missing, anywhere: figures' frames and sentences say so in words."""
    good = json.loads(SWEEP.read_text(encoding="utf-8"))
    good["rules"] = good["rules"][:2]
    known = [place for place in places(good) if place[0] not in ("kind", "version")]
    drawn, said = random.Random(0), []
    for place in [*((name,) for name in good if name not in ("kind", "version")), *drawn.sample(known, 40)]:
        changed = copy.deepcopy(good)
        part = changed
        for name in place[:-1]:
            part = part[name]
        part[place[-1]] = drawn.choice(VALUES)
        sweep_of(run).write_text(json.dumps(changed), encoding="utf-8")
        for read in (*READERS, *(getattr(sweep_answers, name) for name in ANSWERS)):
            try:
                read(run if read.__module__.endswith("answers") else changed)
            except MoescopeError as error:
                said.append(str(error))
    assert len(said) > 30 and max(map(len, said)) < 400


@pytest.mark.parametrize("name", EVIL_DOCUMENTS)
def test_what_is_no_document(run: store.Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_of(run).write_bytes(EVIL_DOCUMENTS[name])
    job = store.plan_path(run.path, "job", "a")
    job.parent.mkdir(exist_ok=True)
    job.write_bytes(EVIL_DOCUMENTS[name])
    with pytest.raises(StoreError) as refused:
        store.read_evaluation(sweep_of(run))
    assert "\n" not in str(refused.value)
    if name != "not a number":
        with pytest.raises(StoreError):
            store.read_plan_document(job)
    assert jobs.jobs(run.path) == []
    with pytest.raises(MoescopeError):
        exhibits.make(_first_sweep(), run)
    if name == "nested":  # the page of all that lies beside a run
        app = visited(monkeypatch, run.path.parent, "what_if", "Live")
        assert "no JSON" in words(app)
    sweep_of(run).unlink()


def _first_sweep() -> str:
    return next(name for name, entry in exhibits.entries().items() if entry.make.__module__ == "app.exhibits.sweep")


@pytest.mark.parametrize(
    "changes",
    [{"commands": []}, {"commands": [[]]}, {"commands": [[1]]}, {"commands": "x"}, {"pid": "1"}, {"pid": 10**30},
     {"started": "x"}, {"name": "../x"}, {"name": "b"}, {"source": 1}, {"host": None}, {"title": "\0"},
     {"more": 1}],
)  # fmt: skip
def test_a_changed_job_is_none(run: store.Run, changes: dict[str, Any]) -> None:
    good = {
        "name": "a", "plan": "", "digest": "", "source": "", "destination": "", "commands": [["recommend", "x"]],
        "host": "elsewhere", "pid": 7, "started": 1.0, "run": str(run.path), "title": "A job",
    }  # fmt: skip
    file = store.plan_path(run.path, "job", "a")
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(good | changes), encoding="utf-8")
    assert jobs.jobs(run.path) == []
    file.write_text(json.dumps(good), encoding="utf-8")
    (job,) = jobs.jobs(run.path)
    for said in ({"step": "x"}, {"step": 10**30}, {"state": ["done"]}, {"total_bytes": "x", "done_bytes": []}):
        for name in ("a", "a-bytes"):
            store.plan_path(run.path, "progress", name).write_text(json.dumps(said), encoding="utf-8")
        status = jobs.status(job)
        assert (status.state, status.step, status.share) == ("elsewhere", 1, None)
    shutil.rmtree(file.parent)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\n", "A", "a\0", "\ud800", "x" * 65, "\u202ea", "a.json"],
)
def test_no_name_of_a_document_leads_elsewhere(run: store.Run, name: str) -> None:
    for kind in store.plans.KINDS:
        with pytest.raises(StoreError):
            store.plan_path(run.path, kind, name)
    with pytest.raises(StoreError):
        store.plan_path(run.path, name, "a")
    for figure in (name, f"{name}-sweep"):
        with pytest.raises(MoescopeError):
            exhibits.make(figure, run)
    with pytest.raises(MoescopeError):
        exhibits.make(_first_sweep(), run, choices={"sweep": name})


FORMULAS = ("=1+1", "+1", "-1", "@x", '=HYPERLINK("http://x","y")', "a,b", 'a"b', "a\nb", "\t=1")


def test_csv_holds_what_there_is() -> None:
    """As docs/operation.md says: nothing is put before what a spreadsheet may take for a formula."""
    frame = pl.DataFrame({"text": FORMULAS})
    assert pl.read_csv(encoded(frame, "csv"), infer_schema=False)["text"].to_list() == list(FORMULAS)
    assert encoded(frame, "csv").splitlines()[1:4] == [b"=1+1", b"+1", b"-1"]


@pytest.mark.parametrize(
    "text",
    ["$x^2$", "$$x$$", "![a](http://x)", "[a](javascript:x)", "<b>a</b>", ":material/home:", ":red[a]", "# a", "- a",
     "1. a", "| a | b |", "~~a~~", "`a`", "http://x.example", "a\0b", "\u202eabc", "a\n\nb", "&lt;b&gt;", "\\$x$"],
)  # fmt: skip
def test_text_stays_text(text: str) -> None:
    """What Markdown reads is escaped, or stands where it reads nothing; a line stays one, and short."""
    for made in (plain(text * 10_000), code(text * 10_000)):
        assert len(made) < 500 and "\n" not in made
    assert code(text).count("`") == 2
    shown = plain(text)
    for mark in "$*_[]<>`#|~":
        assert shown.replace("\\" + mark, "").count(mark) == 0, shown
    assert "http://" not in shown and not shown.replace("\\:", "").count(":")
    assert shown.isprintable() and code(text).isprintable()
