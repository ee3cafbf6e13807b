"""A memory limit: what it bounds is bounded, the results are the same, and what cannot be done within is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import duckdb
import numpy as np
import polars as pl
import pytest

import store
from app.cli import main
from moescope import memory
from moescope.errors import ImportFileError, InputError
from profiler import headline
from profiler.headline import hit_rates
from profiler.headline import subject as parts
from profiler.headline.hit_rates import OWN_CACHES
from profiler.headline.subject import Subject
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions, block_tokens
from profiler.metrics import local_consistency
from store import compaction

LENGTHS = (70, 80, 1, 90, 30, 65, 33, 120)
MEASURED = """
import sys
from pathlib import Path
from moescope import memory
import store
from profiler.headline.flow import PAIRS
from profiler.headline.hit_rates import own_curves
from profiler.headline.subject import Subject
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions

limit = memory.size_of(sys.argv[2]) if sys.argv[2] else None
with memory.limited(limit):
    options = ImportOptions(num_experts=64)
    target = f"{sys.argv[1]}-{limit}"
    path = import_run("npz", Path(sys.argv[1]), directory=target, name="a", options=options, metrics=False)
    if limit:
        with store.open_run(path) as run:
            subject = Subject(run, whole=True)
            assert PAIRS(subject)
            assert own_curves(subject, 0, "observed", [("lru", None)])[0] is not None
print(memory.peak())
"""


def trace(path: Path, lengths: tuple[int, ...], *, layers: int, experts: int, top_k: int) -> Path:
    """Distinct experts per token, that stay a while."""
    generator = np.random.default_rng(5)
    tokens = sum(lengths)
    first = generator.integers(experts, size=(tokens // 4 + 1, layers)).repeat(4, axis=0)[:tokens]
    ids = (first[..., None] + np.arange(top_k) * (experts // top_k - 1)) % experts
    np.savez(path, experts=ids.astype(np.uint8), offsets=np.cumsum([0, *lengths]), num_experts=np.array(experts))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    path = trace(folder / "t.npz", LENGTHS, layers=3, experts=8, top_k=2)
    return import_run("npz", path, directory=folder, name="small", metrics=False)


def lru(ids: np.ndarray, slots: int) -> float:
    """Hit rate of one sequence, by hand: experts of a token are looked up together, then served; a first use is a hit
    while the cache is not full.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for token in ids.tolist():
        seen = len(cache)
        for expert in token:
            hits += expert in cache
            if expert not in cache:
                hits += seen < slots
                seen += 1
        for expert in token:
            if expert not in cache and len(cache) == slots:
                cache.popitem(last=False)
            cache[expert] = None
            cache.move_to_end(expert)
    return hits / ids.size


def test_hit_rates_of_the_whole_trace_are_those_of_one_held_in_memory(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hit_rates, "OWN_TOKENS", 100)
    run = store.open_run(small)
    at_once = OWN_CACHES(Subject(run, whole=True))
    monkeypatch.setattr(parts, "BLOCK_TOKENS", 100)
    subject = Subject(run, whole=True)
    assert len(subject.blocks) > 4
    cut, at_once = ([row for row in rows if row["control"] == "observed"] for rows in (OWN_CACHES(subject), at_once))
    assert cut == at_once, "to the last bit, intervals too"
    rows = pl.DataFrame(at_once)
    assert set(rows["tokens"]) == {sum(LENGTHS)} and set(rows["sequences"]) == {len(LENGTHS)}
    sampled = pl.DataFrame(OWN_CACHES(Subject(run))).filter(pl.col("control") == "observed")
    assert sampled["tokens"].max() < sum(LENGTHS)
    ids = run.selections().ids
    for policy in ("sch", "lru", "lfu", "belady"):
        length = 16 if policy == "sch" else None
        whole = local_consistency.hit_rate_curve(
            selections=ids, num_experts=8, policy=policy, segment_length=length  # type: ignore[arg-type]
        )  # fmt: skip
        mine = rows.filter((pl.col("metric") == f"hit_rate_{policy}") & pl.col("layer").is_not_null())
        if length:
            mine = mine.filter(pl.col("parameters") == json.dumps({"segment_length": length}))
        np.testing.assert_allclose(mine["value"].to_numpy().reshape(3, 8), whole, rtol=1e-14)
    ends = np.cumsum([0, *LENGTHS])
    layer = run.layer_selections(layer=1).ids
    mine = rows.filter((pl.col("metric") == "hit_rate_lru") & (pl.col("layer") == 1))
    for slots in (2, 3, 5):
        by_hand = np.mean([lru(layer[a:b], slots) for a, b in zip(ends[:-1], ends[1:], strict=True)])
        assert mine.filter(pl.col("at") == slots)["value"].item() == pytest.approx(by_hand, rel=1e-12)


@pytest.fixture(autouse=True)
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of tests holds what all tests before left: of a command, it would be this much."""
    monkeypatch.setattr(memory, "held", lambda: 300 << 20)


def test_results_are_the_same_within_a_limit(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, and the file that an import makes, whatever is sorted and read at once."""
    run = store.open_run(small)
    free = headline.compute(run)
    monkeypatch.setattr(memory, "BLOCKS", 1e-4)
    with memory.limited(memory.FLOOR):
        subject = Subject(run)
        assert len(subject.blocks) > 1, "blocks are smaller"
        held = headline.compute(run)
    assert free[0].equals(held[0]) and free[1].equals(held[1])
    monkeypatch.setattr(compaction, "SORTED_PART", 1 << 40)
    monkeypatch.setattr(memory, "IMPORT_BLOCK", 1e-4)
    with memory.limited(memory.FLOOR):
        assert block_tokens(6) < 100
        other = import_run("npz", small.with_name("t.npz"), directory=tmp_path, name="small", metrics=False)
    with duckdb.connect() as connection:
        connection.execute(f"attach '{other}' as made (read_only)")
        places = connection.sql("select layer, step, sequence, start from made.route_chunk").fetchall()
    assert places == sorted(places) and {place[0] for place in places} == {0, 1, 2}
    chunks = [store.open_run(path).selections().ids for path in (small, other)]
    np.testing.assert_array_equal(*chunks)


def test_a_limit_holds(tmp_path: Path) -> None:
    """Peaks of processes of their own: without a limit, the import alone takes more than all the work within one."""
    path = trace(tmp_path / "t.npz", (1000,) * 48, layers=32, experts=64, top_k=8)

    def peak(limit: str) -> int:
        words = [sys.executable, "-c", MEASURED, str(path), limit]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return int(
            subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.split()[-1]
        )

    within, free = peak("512MiB"), peak("")
    assert within <= memory.FLOOR and within + (32 << 20) < free, (within, free)


def test_what_cannot_be_done_within_is_refused_with_numbers(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = r"100 MiB is below the .* MiB .* give --memory-limit \d+MiB or more"
    with pytest.raises(InputError, match=refusal), memory.limited(memory.size_of("100MiB")):
        raise AssertionError("it was taken")
    assert memory.limit() is None
    assert [memory.size_of(text) for text in ("4GiB", "12g", "1.5 MB", "7")] == [4 << 30, 12 * 10**9, 1_500_000, 7]
    with pytest.raises(InputError, match="'much' is no size of memory"):
        memory.size_of("much")
    run = store.open_run(small)
    monkeypatch.setattr(memory, "BLOCKS", 1e-6)
    with memory.limited(memory.FLOOR), pytest.raises(InputError, match="a sequence of 120 tokens.*give --memory-limit"):
        Subject(run).blocks  # noqa: B018
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ImportFileError, match=r"1000 B free; 489 tokens of 3 layers take about"):
        import_run("npz", small.with_name("t.npz"), directory=tmp_path, name="a", options=ImportOptions())
    assert not list(tmp_path.iterdir())
    refused = {
        ("runs", "compute", "small", "--memory-limit", "1MiB"): "below the",
        ("runs", "list", "--whole"): "--whole belongs to runs compute",
        ("runs", "compute", "small", "--workers", "2"): "--ray",
        ("import", "npz", str(small.with_name("t.npz")), "--ray", "local"): "runs compute NAME --ray",
    }
    for words, text in refused.items():
        assert main([*words, "--store", str(small.parent)]) == 2
        assert text in capsys.readouterr().err
