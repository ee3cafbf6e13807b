"""What a plan has made is inspected, streamed and profiled as any other checkpoint, layers of their own included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compressor
import planner
import profiler
import store
from profiler.collect import collect
from profiler.corpus import open_corpus
from profiler.inspect import inspect_model
from profiler.stream import collect_streamed
from sample_data import MODEL, TEXTS

COUNTS = [16, 2, 15, 9, 14, 16]
"""Experts that the default plan leaves the sample model at a quarter less."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model with a quarter of its experts gone, from where it costs least."""
    folder = tmp_path_factory.mktemp("again")
    with store.open_run(MODEL.parent / "runs" / "sample.duckdb") as run:
        compressor.apply(planner.make(run, share=0.25), source=MODEL, destination=folder / "small")
    return folder / "small"


def _text(tokenizer: Any) -> Any:
    return open_corpus(
        [str(TEXTS / "german.jsonl")], tokenizer=tokenizer, sequence_length=96, batch_size=4, token_budget=600
    )


def test_its_layers_are_inspected(small: Path) -> None:
    found = inspect_model(small)
    assert [layer.num_experts for layer in found.moe_layers] == COUNTS


def test_it_is_profiled_and_cut_again(small: Path, tmp_path: Path) -> None:
    model, tokenizer = profiler.load_model(small), profiler.load_tokenizer(small)
    path = collect(
        model, corpus=_text(tokenizer), name="again", tokenizer=tokenizer, store=tmp_path,
        level="routing,activations", headline=False,
    )  # fmt: skip
    with store.open_run(path) as run:
        assert [layer.num_experts for layer in run.layers] == COUNTS
        assert run.badge.status != "invalid"
        load = run.table("expert_load")
        plan = planner.make(run, share=0.1)
    assert int(load["tokens"].sum()) == 6 * 2 * run.info.tokens
    after = compressor.plan.experts_after(plan)
    assert sum(map(len, after.values())) == sum(COUNTS) - 7 and len(after[1, 0]) == 2
    receipt = compressor.apply(plan, source=small, destination=tmp_path / "smaller")
    assert receipt.bytes_after < receipt.bytes_before
    again = [layer.num_experts for layer in profiler.find_moe_layers(profiler.load_model(tmp_path / "smaller"))]
    assert again == [len(experts) for experts in after.values()]


def test_it_is_streamed(small: Path, tmp_path: Path) -> None:
    tokenizer = profiler.load_tokenizer(small)
    path = collect_streamed(small, corpus=_text(tokenizer), name="streamed", tokenizer=tokenizer, store=tmp_path)
    with store.open_run(path) as run:
        assert [layer.num_experts for layer in run.layers] == COUNTS
