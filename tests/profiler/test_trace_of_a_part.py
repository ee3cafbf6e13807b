"""A run whose trace holds one of N sequences: sums are of all text, what rests on the trace is of that part."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose

import profiler.collect as collect_module
import store
from app.frames import tokens as token_frames
from planner.simulate.workload import workload_of
from profiler.alignment import align
from profiler.comparison import compare
from profiler.corpus import open_corpus
from profiler.metrics.local_consistency import hit_rate_curve
from tests.profiler.capture.tiny import build, tokenizer

EVERY = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[store.Run, store.Run]:
    """The whole trace, and one of every third sequence."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "code.txt"
    text.write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(200)))
    model = build("olmoe")

    def collected(name: str, **options: Any) -> store.Run:
        corpus = open_corpus([text], tokenizer=tokenizer(), sequence_length=48, batch_size=4, token_budget=2000)
        return store.open_run(
            collect_module.collect(model, corpus=corpus, store=folder, name=name, tokenizer=tokenizer(), **options)
        )

    return collected("whole"), collected("part", trace_every=EVERY)


def test_load_is_of_all_text_and_has_no_interval_of_a_part(runs: tuple[store.Run, store.Run]) -> None:
    whole, part = (run.metrics("gini").sort("layer") for run in runs)
    assert part["value"].to_list() == whole["value"].to_list()
    assert part["tokens"].to_list() == whole["tokens"].to_list()
    assert part["low"].is_null().all() and not whole["low"].is_null().all()


def test_metrics_of_the_trace_are_of_that_part(runs: tuple[store.Run, store.Run]) -> None:
    whole, part = runs
    kept = part.traced_sequences
    assert 1 < len(kept) < whole.info.sequences
    trace = whole.selections(sequences=kept["sequence"].to_list())
    rows = part.metrics("hit_rate_lru").filter(
        (pl.col("control") == "observed") & (pl.col("layer") == 1) & (pl.col("parameters") == "{}")
    )
    experts = part.layers[1].num_experts
    by_hand = hit_rate_curve(selections=trace.ids[1][None], num_experts=experts, policy="lru")[0]
    assert len(rows) and set(rows["tokens"]) == {int(kept["tokens"].sum())}
    assert_allclose(rows.sort("at")["value"], by_hand[rows.sort("at")["at"].to_numpy().astype(int) - 1], atol=1e-12)
    for row in part.metrics().filter(pl.col("low").is_not_null()).iter_rows(named=True):
        assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9 or row["metric"] == "split_half_agreement", row


def test_readers_see_the_part(runs: tuple[store.Run, store.Run]) -> None:
    whole, part = runs
    kept = part.traced_sequences["sequence"].to_list()
    assert token_frames.sequences(part)["sequence"].to_list() == kept
    work = workload_of(part)
    assert sorted(work.sequences.tolist()) == kept
    every = workload_of(whole)
    places = [int(np.flatnonzero(every.sequences == number)[0]) for number in work.sequences]
    assert np.array_equal(work.ids, every.requests(places).ids)


def test_the_part_compares_with_the_whole_as_equal(runs: tuple[store.Run, store.Run]) -> None:
    whole, part = runs
    for by_position in (False, True):
        alignment = align(part, whole, by_position=by_position)
        assert alignment.pairs[:, 0].tolist() == part.traced_sequences["sequence"].to_list()
        counted, overlap, exact = compare(alignment).sequences.T
        assert np.array_equal(overlap, counted) and np.array_equal(exact, counted) and counted.all()
