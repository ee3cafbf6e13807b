"""Statistics add up: shards, workers and domains, by the merge rules that the schema declares for every column."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import profiler
import store
from profiler.capture.session import WatchSession
from store.schema import Column, Table, tables
from tests.profiler.capture.tiny import batch, build, tokenizer

LEVELS = "activations,similarity,errors,moments,lookahead,attention"
SUMMED = [name for name, table in tables().items() if table.keys]
LISTED = ["route_chunk", "score_chunk", "sequence_token"]
NOT_HERE = {"neuron_gradient", "expert_gradient", "loss", "load_span"}
"""Tables of a level that needs a backward pass, and of imports alone."""

TEXTS = [batch(seed=1), batch(seed=2, padding="left")]


def recorded(folder: Path, name: str, texts: list[Any], domains: list[Any], **options: Any) -> store.Run:
    """A run over some texts; ``flush`` ends a shard after each."""
    flush = options.pop("flush", False)
    options = {"level": LEVELS, "router_scores": 3, "errors_every": 2, "tokenizer": tokenizer()} | options
    with torch.no_grad(), profiler.watch(build("qwen2_moe"), store=folder, name=name, **options) as session:
        for number, (inputs, domain) in enumerate(zip(texts, domains, strict=True)):
            session.label(domains=domain, text=number)
            session.model(**inputs)
            if flush:
                session.flush()
    assert session.path is not None
    return store.open_run(session.path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """Both texts in one shard, the rows of each of different domains."""
    return recorded(tmp_path_factory.mktemp("whole"), "whole", TEXTS, [["a", "b", "a"]] * 2)


def assert_alike(found: pl.DataFrame, expected: pl.DataFrame, table: Table) -> None:
    """Equal but for the rounding of sums: in 32 bits within a batch, and vectors on their way to the disk."""
    keys = list(table.keys)
    found, expected = (frame.sort(keys).select(column.name for column in table.columns) for frame in (found, expected))
    assert_frame_equal(found.select(keys), expected.select(keys))
    for column in table.columns:
        if column.rule == "key":
            continue
        pair = [frame[column.name] for frame in (found, expected)]
        exact = column.rule != "sum" or column.type.startswith("bigint")
        tolerance = 0.0 if exact else 1e-5 if column.type.startswith("float") else 1e-6
        assert pair[0].null_count() == pair[1].null_count(), column.name
        values = [_flat(part) for part in pair]
        if values[0].dtype.kind not in "fiu":
            assert values[0].tolist() == values[1].tolist(), column.name
            continue
        slack = tolerance * max(np.abs(values[1]).max(initial=0), 1e-30)
        np.testing.assert_allclose(*values, rtol=tolerance, atol=slack, err_msg=f"{table.name}.{column.name}")


def _flat(values: pl.Series) -> np.ndarray:
    values = values.drop_nulls()
    return (values.explode() if values.dtype == pl.List else values).to_numpy()


@pytest.mark.parametrize("name", [*SUMMED, *LISTED])
def test_two_shards_merged_equal_one(name: str, whole: store.Run, sharded: store.Run) -> None:
    _assert_same(name, whole, sharded)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """The same in two shards."""
    return recorded(tmp_path_factory.mktemp("sharded"), "sharded", TEXTS, [["a", "b", "a"]] * 2, flush=True)


@pytest.mark.parametrize("name", [*SUMMED, *LISTED])
def test_shards_of_two_workers_equal_one_run(name: str, whole: store.Run, two_workers: store.Run) -> None:
    _assert_same(name, whole, two_workers)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """The two texts watched by two sessions, whose shards are put into one folder."""
    folder = tmp_path_factory.mktemp("workers")
    sessions: list[WatchSession] = []
    for number, inputs in enumerate(TEXTS):
        model = build("qwen2_moe")
        options = {"level": LEVELS, "router_scores": 3, "errors_every": 2, "tokenizer": tokenizer()}
        session = profiler.watch(model, store=folder, name=f"worker{number}", **options)
        with torch.no_grad(), session.attached():
            session.label(domains=["a", "b", "a"], sequences=range(3 * number, 3 * number + 3), text=number)
            model(**inputs)
        session.flush()
        sessions.append(session)
    first, second = (session.writer.folder for session in sessions)
    shutil.copytree(second / "shard-000000", first / "shard-000001")
    return store.open_run(sessions[0].writer.finish(seconds=1.0))


def _assert_same(name: str, whole: store.Run, other: store.Run) -> None:
    table = tables()[name]
    expected, found = whole.table(name), other.table(name)
    assert len(expected) or name in NOT_HERE
    if name in LISTED:
        assert_frame_equal(*(frame.sort(frame.columns[:4]) for frame in (found, expected)))
    else:
        assert_alike(found, expected, table)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """The same with vectors kept by domain as well."""
    domains = [["a", "b", "a"]] * 2
    return recorded(tmp_path_factory.mktemp("apart"), "apart", TEXTS, domains, vectors_per_domain=True)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """The same with all text of one domain."""
    return recorded(tmp_path_factory.mktemp("alike"), "alike", TEXTS, ["all", "all"], vectors_per_domain=True)


BY_DOMAIN = [name for name in SUMMED if "domain" in tables()[name].keys]


@pytest.mark.parametrize("name", BY_DOMAIN)
def test_a_domain_and_the_rest_equal_the_whole(name: str, apart: store.Run, alike: store.Run) -> None:
    table, frame = tables()[name], apart.table(name)
    if name in NOT_HERE:
        return
    assert set(frame["domain"]) == ({"a", "b"} if name != "expert_similarity" else {"b"})  # whose sample is small
    merged = _merged(frame.with_columns(domain=pl.lit("all")), table)
    assert_alike(merged, alike.table(name), table)


def _merged(frame: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Rows of equal keys put together with nothing but numpy, by the rule of each column."""
    rows = []
    for _, part in frame.group_by(table.keys, maintain_order=True):
        rows.append({column.name: _value(column, part) for column in table.columns})
    return pl.DataFrame(rows, schema=frame.schema)


def _value(column: Column, part: pl.DataFrame) -> Any:
    values = part[column.name].drop_nulls().to_list()
    if not values or column.rule == "key":
        return values[0] if values else None
    if column.rule.startswith("at "):
        # Of equal ones the earliest in the text.
        target = column.rule.removeprefix("at ")
        beside = [name for name in part.columns if name.endswith("sequence")]
        return part.sort(target, *beside, descending=[True, *[False] * len(beside)], nulls_last=True)[column.name][0]
    merged = np.sum(values, axis=0) if column.rule == "sum" else np.max(values, axis=0)
    return merged.tolist()


@pytest.mark.parametrize("name", BY_DOMAIN)
def test_a_domain_of_the_whole_is_that_text_alone(name: str, mixed: store.Run, alone: store.Run) -> None:
    table = tables()[name]
    assert_alike(mixed.table(name).filter(domain="a"), alone.table(name), table)
    assert len(alone.table(name)) or name in NOT_HERE


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """One text of each domain."""
    return recorded(tmp_path_factory.mktemp("mixed"), "mixed", TEXTS, ["a", "b"], vectors_per_domain=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """The text of the first domain alone."""
    return recorded(tmp_path_factory.mktemp("alone"), "alone", TEXTS[:1], ["a"], vectors_per_domain=True)
