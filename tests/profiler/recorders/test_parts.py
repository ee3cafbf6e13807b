"""Table ``expert_part`` against sums made token by token, and the rule that deals sequences into parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

import profiler
import store
from store import NUM_PARTS, part_of_sequence
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import Array, LayerTokens, Tokenwise, observe, play, watched

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenwise, store.Run]:
    """What happened in two batches, and the run of the same in two shards (prompt and decode)."""
    model = build(request.param)
    return observe(model), watched(model, tmp_path_factory.mktemp(request.param))


def by_hand(number: int) -> int:
    """The part of a sequence from the golden ratio in floating point."""
    return int(number * (5**0.5 - 1) / 2 % 1.0 * NUM_PARTS)


def matrix(run: store.Run, layer: int, column: str, kind: str = "routed") -> Array:
    """(experts, parts) one column of a layer."""
    rows = run.table("expert_part").filter((pl.col("layer") == layer) & (pl.col("kind") == kind)).sort("expert")
    return np.array(rows[column].to_list(), dtype=np.float64)


def summed(part: NDArray[np.int64], values: Array) -> Array:
    """(experts, parts) sums of values (tokens, experts) by the part of each token, token by token."""
    result = np.zeros((values.shape[1], NUM_PARTS))
    for token, place in enumerate(part):
        result[:, place] += values[token]
    return result


def test_sums_per_part(case: tuple[Tokenwise, store.Run]) -> None:
    seen, run = case
    part = np.array([by_hand(int(number)) for number in seen.sequence])
    everything = np.ones(len(part), dtype=bool)
    assert len(set(part)) > 3
    for layer in seen.layers:
        index = layer.layer.layer
        norm = np.linalg.norm(layer.output, axis=-1)
        dense = {
            "tokens": layer.dense(np.ones_like(layer.gate), everything),
            "gate_sum": layer.dense(layer.gate, everything),
            "norm_sum": layer.dense(norm, everything),
            "gated_norm_sum": layer.dense(layer.gate * norm, everything),
        }
        for column, values in dense.items():
            found, expected = matrix(run, index, column), summed(part, values)
            assert found.shape == (layer.size, NUM_PARTS)
            assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.max(), err_msg=column)
        assert_array_equal(matrix(run, index, "tokens"), summed(part, dense["tokens"]))
        _shared(run, layer, part)


def _shared(run: store.Run, layer: LayerTokens, part: NDArray[np.int64]) -> None:
    index, shared = layer.layer.layer, layer.shared
    if shared is None:
        assert not len(matrix(run, index, "tokens", "shared"))
        return
    norm = np.linalg.norm(shared.output, axis=-1)
    columns = {"tokens": np.ones(len(part)), "gate_sum": shared.gate, "norm_sum": norm}
    for column, values in (columns | {"gated_norm_sum": shared.gate * norm}).items():
        found, expected = matrix(run, index, column, "shared"), summed(part, values[:, None])
        assert_allclose(found, expected, rtol=1e-5, err_msg=column)


def test_parts_add_up_to_the_other_tables(case: tuple[Tokenwise, store.Run]) -> None:
    _, run = case
    keys = ["layer", "expert", "kind"]
    parts = run.table("expert_part").with_columns(pl.col("tokens", "gate_sum", "norm_sum").list.sum())
    load = run.table("expert_load").group_by(keys).agg(pl.col("tokens", "gate_sum").sum())
    both = load.join(parts, on=keys, suffix="_of_parts")
    assert len(both) == len(load)
    assert_array_equal(both["tokens"], both["tokens_of_parts"])
    assert_allclose(both["gate_sum"], both["gate_sum_of_parts"], rtol=1e-6)
    output = run.table("expert_output").group_by(keys).agg(pl.col("tokens", "norm_sum").sum())
    both = output.join(parts, on=keys, suffix="_of_parts")
    assert_array_equal(both["tokens"], both["tokens_of_parts"])
    assert_allclose(both["norm_sum"], both["norm_sum_of_parts"], rtol=1e-6)


def test_routing_alone_has_no_norms(tmp_path: Path) -> None:
    with profiler.watch(build("olmoe"), store=tmp_path, name="routing") as session:
        play(session.model, session)
    assert session.path is not None
    run = store.open_run(session.path)
    frame = run.table("expert_part")
    assert frame["norm_sum"].is_null().all() and frame["gated_norm_sum"].is_null().all()
    assert frame["tokens"].list.sum().sum() == run.table("expert_load")["tokens"].sum()


def test_numbers_of_every_kind_fall_into_the_same_parts() -> None:
    numbers = np.array([0, 1, 2, 3, 17, 1000, 2**31 - 1, 2**31, 2**32 - 1])
    assert [part_of_sequence(int(number)) for number in numbers[:6]] == [by_hand(int(one)) for one in numbers[:6]]
    assert_array_equal(part_of_sequence(numbers), [part_of_sequence(int(number)) for number in numbers])
    assert_array_equal(part_of_sequence(torch.tensor(numbers)).numpy(), part_of_sequence(numbers))


@pytest.mark.parametrize("domains", [1, 2, 3, 4, 7, 8, 16])
def test_domains_that_are_fed_in_turn_spread_over_all_parts(domains: int) -> None:
    numbers = np.arange(128 * domains)
    for domain in range(domains):
        counts = np.bincount(part_of_sequence(numbers[numbers % domains == domain]), minlength=NUM_PARTS)
        assert counts.max() <= 16 and (counts > 0).sum() >= 14  # 8 each, were it even; the number modulo 16 would fail
