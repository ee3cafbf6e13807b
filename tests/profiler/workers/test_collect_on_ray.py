"""Collections on a Ray's workers against the same collection in one process, with workers that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import profiler.collect as collect_module
import store
from moescope import cluster
from moescope.errors import InputError, ModelError, RunError, StoreError
from profiler.capture.levels import LEVELS, RecordingOptions, parse_levels
from profiler.corpus import Corpus, open_corpus
from profiler.workers import collect_on_ray
from store.schema import Table
from tests.profiler.capture.tiny import build, tokenizer

pytest.importorskip("ray")

LEVEL = "routing,activations,similarity,moments,lookahead,attention,predictions"
PART_TOKENS = 300


@pytest.fixture(scope="module")
def ray_of_two() -> Iterator[cluster.Cluster]:
    with cluster.connected("local", workers=2, cpus_per_worker=0.5) as joined:
        yield joined


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "code.txt").write_text("def f(x):\n    return x + 1\n\n" * 60)
    (folder / "english.txt").write_text("It was a bright cold day in April.\n\nAnd the clocks struck.\n\n" * 40)
    return folder


def corpus(texts: Path, **options: Any) -> Corpus:
    settings = {"sequence_length": 48, "batch_size": 4, "token_budget": 2000, **options}
    return open_corpus([texts / "code.txt", texts / "english.txt"], tokenizer=tokenizer(), **settings)


@pytest.fixture(scope="module")
def alone(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return collect_module.collect(
        build("qwen2_moe"), corpus=corpus(texts), store=tmp_path_factory.mktemp("alone"), name="tiny",
        tokenizer=tokenizer(), level=LEVEL, router_scores=-1, similarity_every=2, headline=False,
    )  # fmt: skip


def collect(joined: cluster.Cluster, texts: Path, folder: Path, **options: Any) -> Path:
    load = options.pop("load", partial(build, "qwen2_moe"))
    given = options.pop("corpus", None) or corpus(texts)
    level = options.pop("level", LEVEL)
    recording = RecordingOptions(levels=parse_levels(level), router_scores=-1, similarity_every=2)
    return collect_on_ray(
        joined, load, corpus=given, name="tiny", tokenizer=tokenizer(), options=recording, store=folder,
        part_tokens=options.pop("part_tokens", PART_TOKENS), headline=False, **options,
    )  # fmt: skip


def crew(joined: cluster.Cluster, workers: int) -> cluster.Cluster:
    """The same Ray for another number of workers."""
    return cluster.Cluster(joined.ray, "local", workers=workers, cpus=0.5, gpus=0)


def assert_same(mine: Path, theirs: Path) -> None:
    """Every table but the checks: keys, counts, text and selections equal, sums to 1e-12, 32-bit ones to a neighbour."""
    one, other = store.open_run(mine), store.open_run(theirs)
    for name, table in store.tables().items():
        if name in ("run", "check"):
            continue
        first, second = (_sorted(table, run.table(name)) for run in (one, other))
        assert first.shape == second.shape, name
        for column in table.columns:
            _assert_equal(f"{name}.{column.name}", first[column.name], second[column.name], column.type)
    assert one.info.tokens == other.info.tokens
    assert len(one.table("check")) == len(other.table("check"))


def _sorted(table: Table, frame: pl.DataFrame) -> pl.DataFrame:
    keys = [column.name for column in table.columns if not column.type.endswith("[]") and column.type != "blob"]
    names = list(table.keys) or [name for name in keys if name in ("layer", "step", "sequence", "start")]
    return frame.sort(names, nulls_last=True) if names else frame


def _assert_equal(name: str, first: pl.Series, second: pl.Series, kind: str) -> None:
    assert first.is_null().equals(second.is_null()), name
    if not kind.startswith(("double", "float")):
        assert first.equals(second), name
        return
    if kind.endswith("[]"):
        first, second = first.explode(), second.explode()
    a, b = (series.drop_nulls().to_numpy() for series in (first, second))
    assert a.dtype == b.dtype, name
    if a.dtype == np.float32:
        assert np.all((a == b) | (np.isnan(a) & np.isnan(b)) | (np.nextafter(a, b) == b)), name
        return
    # What cancels is held against the largest sum of the column: logits of one expert have both signs.
    scale = np.nanmax(np.abs(b), initial=0.0)
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * scale, err_msg=name)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_what_one_process_gives(
    workers: int, ray_of_two: cluster.Cluster, alone: Path, texts: Path, tmp_path: Path
) -> None:
    told: list[store.Progress] = []
    path = collect(crew(ray_of_two, workers), texts, tmp_path, progress=told.append)
    assert_same(path, alone)
    run = store.open_run(path)
    assert run.badge.status == store.open_run(alone).badge.status == "valid", run.badge.reason
    assert told[-1].tokens == told[-1].token_budget == 2000
    kept = run.info.settings["workers"]
    assert (kept["engine"], kept["workers"], kept["part_tokens"]) == ("ray", workers, PART_TOKENS)
    assert kept["parts"] > 3
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.duckdb"]
