"""Plans beside a run: kept as they are, named by their content, and taken along when the run is renamed or deleted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import store
from moescope.errors import StoreError
from store.plans import plans_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    writer = store.RunWriter.create(tmp_path, "mine", store.RunInfo(model="toy", num_layers=2))
    writer.write_shard({"sequence": {"sequence": [0], "domain": ["code"], "tokens": [9], "prompt_tokens": [9]}})
    return writer.finish()


def test_a_plan_is_kept_to_the_byte(run: Path) -> None:
    text = json.dumps({"steps": ["日本"]}, indent=1, ensure_ascii=False) + "\n"
    assert store.list_plans(run) == []
    path = store.write_plan(run, text)
    assert path.parent == run.with_name("mine.plans") == plans_folder(run)
    assert path.read_bytes() == text.encode()
    assert store.read_plan(path) == text
    assert store.read_plan_document(path) == {"steps": ["日本"]}
    assert store.write_plan(run, text) == path
    assert store.list_plans(run) == [path]


def test_kinds_stand_beside_each_other_the_newest_first(run: Path) -> None:
    first, second = store.write_plan(run, '{"a": 1}'), store.write_plan(run, '{"a": 2}')
    job = store.write_plan(run, "{}", kind="job", name="one")
    assert job == store.plan_path(run, "job", "one")
    os.utime(first, (2e9, 2e9))
    os.utime(second, (1e9, 1e9))
    assert store.list_plans(run) == [first, second]
    assert store.list_plans(run, "job") == [job]
    assert [path.name for path in plans_folder(run).iterdir() if path.name.startswith(".")] == []


def test_a_plan_leaves_the_version_of_the_run_alone(run: Path) -> None:
    before = store.version_of(run)
    store.write_plan(run, "{}", kind="progress", name="one")
    assert store.version_of(run) == before


def test_plans_go_with_the_run(run: Path) -> None:
    store.write_plan(run, "{}")
    catalog = store.Catalog(run.parent)
    renamed = catalog.rename("mine", "yours")
    assert len(store.list_plans(renamed)) == 1
    catalog.delete("yours")
    assert not plans_folder(renamed).exists()


@pytest.mark.parametrize("name", ["", "../up", "a/b", "A", "x" * 65, "a.b"])
def test_names_that_are_none(run: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot name a job"):
        store.plan_path(run, "job", name)


@pytest.mark.parametrize(("text", "message"), [("[1]", "takes one JSON object"), ("{", "is no JSON"), ("", "no JSON")])
def test_texts_that_are_no_documents(run: Path, text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.write_plan(run, text)
    damaged = run.with_name("plan.json")
    damaged.write_text(text)
    with pytest.raises(StoreError, match=message):
        store.read_plan(damaged)


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run at"):
        store.write_plan(tmp_path / "nothing.duckdb", "{}")
    with pytest.raises(StoreError, match="no kind 'idea'"):
        store.write_plan(run, "{}", kind="idea")
    with pytest.raises(StoreError, match="cannot be read"):
        store.read_plan(tmp_path / "nothing.json")
