"""Evaluations beside a run: written whole, validated, listed, and taken along when the run is renamed or deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import store
from moescope.errors import StoreError
from store.evaluations import folder_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    writer = store.RunWriter.create(tmp_path, "mine", store.RunInfo(model="toy", num_layers=2))
    writer.write_shard({"sequence": {"sequence": [0], "domain": ["code"], "tokens": [9], "prompt_tokens": [9]}})
    return writer.finish()


def document(**changes: Any) -> dict[str, Any]:
    names = ("model", "experts", "data", "base", "ablated", "controls", "layers", "verdict", "notes")
    return {"kind": "ablation", "version": 1, **dict.fromkeys(names), "experts": [[1, 2]], **changes}


def test_what_was_written_is_read(run: Path) -> None:
    assert store.list_evaluations(run) == []
    path = store.write_evaluation(run, document(base={"value": 2.5}))
    assert path.parent == run.with_name("mine.evaluations") == folder_of(run)
    assert store.read_evaluation(path) == document(base={"value": 2.5})
    assert store.list_evaluations(run, "ablation") == store.list_evaluations(run) == [path]


def test_the_same_measurement_replaces_itself(run: Path) -> None:
    first = store.write_evaluation(run, document(base=1))
    assert store.write_evaluation(run, document(base=2)) == first
    other = store.write_evaluation(run, document(experts=[[1, 3]]))
    assert store.list_evaluations(run) == [other, first]
    assert store.read_evaluation(first)["base"] == 2
    assert [path.name for path in folder_of(run).iterdir() if path.name.startswith(".")] == []


def test_a_new_evaluation_changes_the_version_of_the_run(run: Path) -> None:
    before = store.version_of(run)
    path = store.write_evaluation(run, document())
    written = store.version_of(run)
    assert written != before
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"base": null', '"base": true'), encoding="utf-8")  # as long as it was, in place
    overwritten = store.version_of(run)
    assert len(path.read_text(encoding="utf-8")) == len(text) and overwritten not in (before, written)
    path.unlink()
    assert store.version_of(run) == before


def test_an_evaluation_is_named_by_its_models_and_text(run: Path) -> None:
    whole = {"kind": "evaluation", "version": 1, **dict.fromkeys(store.evaluations.KINDS["evaluation"])}
    first = store.write_evaluation(run, {**whole, "model": {"name": "small"}, "base": {"name": "large"}})
    assert first.name.startswith("evaluation-")
    again = {**whole, "model": {"name": "small"}, "base": {"name": "large"}, "notes": ["measured again"]}
    assert store.write_evaluation(run, again) == first
    assert store.read_evaluation(first)["notes"] == ["measured again"]
    others = [{**again, "base": {"name": "other"}}, {**again, "data": {"corpus_sha256": "0"}}]
    assert len({first, *(store.write_evaluation(run, other) for other in others)}) == 3
    ablated = store.write_evaluation(run, document())
    assert store.list_evaluations(run, "ablation") == [ablated]
    assert len(store.list_evaluations(run, "evaluation")) == 3
    with pytest.raises(StoreError, match="lacks probes"):
        store.write_evaluation(run, {name: value for name, value in again.items() if name != "probes"})


def test_they_go_with_the_run(run: Path) -> None:
    store.write_evaluation(run, document())
    catalog = store.Catalog(run.parent)
    renamed = catalog.rename("mine", "yours")
    assert len(store.list_evaluations(renamed)) == 1
    catalog.delete("yours")
    assert not folder_of(renamed).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "guess"}, "has kind 'guess'; there are ablation, evaluation"),
        ({"version": 7}, "has version 7; this moescope reads version 1"),
        ({"base": float("nan")}, "plain JSON without NaN"),
        ({"base": {1, 2}}, "plain JSON without NaN"),
    ],
)
def test_what_is_refused(run: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.write_evaluation(run, document(**changes))
    assert store.list_evaluations(run) == []


def test_files_that_are_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run at"):
        store.write_evaluation(tmp_path / "nothing.duckdb", document())
    file = tmp_path / "some.json"
    for text, message in (
        ("[1]", "one JSON object"),
        ("{", "is no JSON"),
        ('{"kind": "ablation", "version": 1}', "lacks model, experts"),
    ):
        file.write_text(text)
        with pytest.raises(StoreError, match=message):
            store.read_evaluation(file)
