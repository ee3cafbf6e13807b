"""Collections on a Ray's workers against the same collection in one process, with workers that are killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import profiler.collect as collect_module
import store
from moescope import cluster
from moescope.errors import InputError, RunError
from profiler.capture.levels import RecordingOptions, parse_levels
from profiler.corpus import Corpus, open_corpus
from profiler.workers import collect_on_ray
from profiler.workers.job import WorkersJob
from store.schema import Table
from tests.profiler.capture.tiny import build, tokenizer

pytest.importorskip("ray")

LEVEL = "routing,activations,similarity,moments,lookahead,attention,predictions"
PART_TOKENS, PARTS = 300, 6


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
    return collect_alone(texts, tmp_path_factory.mktemp("alone"))


def collect_alone(texts: Path, folder: Path, **options: Any) -> Path:
    return collect_module.collect(
        build("qwen2_moe"), corpus=corpus(texts), store=folder, name="tiny", tokenizer=tokenizer(), level=LEVEL,
        router_scores=-1, similarity_every=2, headline=False, **options,
    )  # fmt: skip


def collect(joined: cluster.Cluster, texts: Path, folder: Path | str, **options: Any) -> Path:
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
    """Every table but the checks: keys, counts, text, selections equal; sums to 1e-12, in 32 bits to a neighbour."""
    one, other = store.open_run(mine), store.open_run(theirs)
    for name, table in store.tables().items():
        if name in ("run", "check"):
            continue
        first, second = (_sorted(table, run.table(name)) for run in (one, other))
        assert first.shape == second.shape, name
        for column in table.columns:
            _assert_equal(f"{name}.{column.name}", first[column.name], second[column.name], column.type)
    assert one.info.tokens == other.info.tokens


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


def die_once(folder: Path, name: str) -> None:
    """Kill this process as the kernel would, unless one has died here already."""
    try:
        (folder / name).open("x").close()
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def mortal(folder: Path) -> Any:
    """A model whose worker is killed once in the middle of a part, and once between writing a shard and saying so."""
    import profiler.workers.session as session

    model, publish, forwards = build("qwen2_moe"), store.publish_shard, iter(range(10**6))

    def and_die(*arguments: Any) -> bool:
        published = publish(*arguments)
        if arguments[1] == PARTS - 1:  # nobody needs to take its place
            die_once(folder, "reporting")
        return published

    session.run_store.publish_shard = and_die  # type: ignore[assignment]
    model.register_forward_pre_hook(lambda *_: die_once(folder, "working") if next(forwards) == 4 else None)
    model.model.register_forward_pre_hook(lambda *_: die_once(folder, "working") if next(forwards) == 4 else None)
    return model


def test_killed_workers_change_nothing(ray_of_two: cluster.Cluster, alone: Path, texts: Path, tmp_path: Path) -> None:
    deaths, told = tmp_path / "deaths", list[store.Progress]()
    deaths.mkdir()
    path = collect(ray_of_two, texts, tmp_path, load=partial(mortal, deaths), progress=told.append)
    assert {file.name for file in deaths.iterdir()} == {"working", "reporting"}
    assert_same(path, alone)
    run = store.open_run(path)
    assert len(run.table("check")) == len(store.open_run(alone).table("check"))
    assert run.badge.status == store.open_run(alone).badge.status == "valid", run.badge.reason
    assert told[-1].tokens == told[-1].token_budget == 2000
    kept = run.info.settings["workers"]
    assert (kept["engine"], kept["workers"], kept["part_tokens"]) == ("ray", 2, PART_TOKENS)
    assert kept["parts"] == PARTS
    assert {file.name for file in tmp_path.iterdir()} == {"tiny.duckdb", "deaths"}


def test_an_interrupted_collection_goes_on_with_other_workers_or_with_none(
    ray_of_two: cluster.Cluster, alone: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: WorkersJob, crew: Any) -> None:
        raise KeyboardInterrupt

    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    words = r"interrupted; after [\d,]+ of 2,000 .* --resume"
    with monkeypatch.context() as patch, pytest.raises(RunError, match=words):
        patch.setattr(WorkersJob, "_take_verdicts", interrupt)  # when the first part has been recorded
        collect(ray_of_two, texts, mine)
    folder = mine / "tiny.live"
    assert not list(folder.glob(".staging-*"))
    assert len(list(folder.glob("shard-*"))) >= 1
    with store.open_run(folder) as run:
        assert run.progress is not None and run.progress.state == "interrupted"
    with pytest.raises(InputError, match=f"begun with --part-tokens {PART_TOKENS}"):
        collect(ray_of_two, texts, mine, resume=True, part_tokens=200)
    shutil.copytree(mine, theirs)
    assert_same(collect(crew(ray_of_two, 1), texts, f"file://{mine}", resume=True, part_tokens=None), alone)
    assert_same(collect_alone(texts, theirs, resume=True), alone)
