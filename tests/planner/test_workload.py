"""Workloads against sets built token by token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from moescope.errors import MetricError, PlanError
from planner.simulate.workload import Workload, batched, decode, prefill, workload_of

SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"


def _selections(seed: int, *, layers: int = 2, lengths: tuple[int, ...] = (4, 7, 1), experts: int = 6, k: int = 2):
    generator = np.random.default_rng(seed)
    ids = np.full((layers, len(lengths), max(lengths), k), -1, np.int16)
    for layer in range(layers):
        for sequence, length in enumerate(lengths):
            for token in range(length):
                ids[layer, sequence, token] = generator.permutation(experts)[:k]
    weights = np.sort(generator.random(ids.shape), axis=-1)[..., ::-1] * (ids >= 0)
    return ids, weights.astype(np.float32)


def _passes(work: Workload, layer: int) -> list[dict[int, tuple[int, float]]]:
    """Per pass: expert -> (tokens, weight)."""
    gates = np.zeros(work.ids.shape) if work.weights is None else work.weights
    return [
        {int(e): (int(t), float(g)) for e, t, g in zip(ids, tokens, gate, strict=True) if e >= 0}
        for ids, tokens, gate in zip(work.ids[layer], work.tokens[layer], gates[layer], strict=True)
    ]


def _united(ids: np.ndarray, weights: np.ndarray, members: list[tuple[int, int]]) -> dict[int, tuple[int, float]]:
    """The union that tokens (sequence, token) of one layer need, by hand."""
    tokens, gates = Counter[int](), {}
    for sequence, token in members:
        for expert, gate in zip(ids[sequence, token], weights[sequence, token], strict=True):
            if expert >= 0:
                tokens[int(expert)] += 1
                gates[int(expert)] = max(gates.get(int(expert), 0.0), float(gate))
    return {expert: (count, gates[expert]) for expert, count in tokens.items()}


def test_every_token_is_a_pass() -> None:
    ids, weights = _selections(0)
    work = decode(selections=ids, num_experts=6, weights=weights, domains=["a", "b", "a"])
    assert work.offsets.tolist() == [0, 4, 11, 12]
    assert work.domains == ("a", "b", "a")
    assert work.request_of_pass.tolist() == [0] * 4 + [1] * 7 + [2]
    tokens = [(sequence, token) for sequence, length in enumerate((4, 7, 1)) for token in range(length)]
    for layer in range(2):
        assert _passes(work, layer) == [_united(ids[layer], weights[layer], [one]) for one in tokens]
    assert work.needed.tolist() == [[2] * 12] * 2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(1, 4), lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_batches_need_the_union_of_their_tokens(seed: int, size: int, lengths: list[int]) -> None:
    ids, weights = _selections(seed, lengths=tuple(lengths))
    work = batched(decode(selections=ids, num_experts=6, weights=weights), size=size)
    groups = [range(first, min(first + size, len(lengths))) for first in range(0, len(lengths), size)]
    expected = [
        [(one, at) for one in group if at < lengths[one]]
        for group in groups for at in range(max(lengths[one] for one in group))
    ]  # fmt: skip
    for layer in range(2):
        assert _passes(work, layer) == [_united(ids[layer], weights[layer], members) for members in expected]
    assert work.pass_tokens.tolist() == [len(members) for members in expected]
    assert work.num_requests == len(groups)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), chunk=st.integers(1, 9), lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_prompts_are_read_in_chunks(seed: int, chunk: int, lengths: list[int]) -> None:
    ids, weights = _selections(seed, lengths=tuple(lengths))
    work = prefill(decode(selections=ids, num_experts=6, weights=weights), chunk=chunk)
    expected = [
        [(one, token) for token in range(first, min(first + chunk, length))]
        for one, length in enumerate(lengths) for first in range(0, length, chunk)
    ]  # fmt: skip
    for layer in range(2):
        assert _passes(work, layer) == [_united(ids[layer], weights[layer], members) for members in expected]
    assert work.counts().sum() == 2 * 2 * sum(lengths)


def test_parts_of_a_workload() -> None:
    ids, weights = _selections(1, lengths=(3, 5, 2, 4, 1))
    work = decode(selections=ids, num_experts=6, weights=weights, domains=["a", "b", "a", "b", "a"])
    first, second = work.halves()
    assert [first.sequences.tolist(), second.sequences.tolist()] == [[0, 1, 2], [3, 4]]
    assert work.of_domain("b").sequences.tolist() == work.without_domain("a").sequences.tolist() == [1, 3]
    turned = work.requests([4, 0])
    assert turned.ids.tolist() == np.concatenate([work.ids[:, 14:15], work.ids[:, 0:3]], axis=1).tolist()
    assert (work.counts() == first.counts() + second.counts()).all()
    with pytest.raises(PlanError, match="no request is left"):
        work.of_domain("c")


def test_layers_of_other_widths_and_tokens_without_experts() -> None:
    ids, _ = _selections(2, lengths=(3,))
    ids[1, 0, :, 1] = -1  # the second layer uses one expert
    ids[:, 0, 1] = -1  # a token that uses none anywhere is no pass
    work = decode(selections=ids, num_experts=6)
    assert work.needed.tolist() == [[2, 2], [1, 1]]
    assert work.weights is None


def test_a_run_as_a_workload() -> None:
    with store.open_run(SAMPLE) as run:
        work = workload_of(run)
        load = run.table("expert_load").filter(kind="routed").group_by("layer", "expert").agg(tokens=_sum("tokens"))
        assert all(work.counts()[layer, expert] == tokens for layer, expert, tokens in load.iter_rows())
        assert work.num_passes == run.info.tokens
        assert set(work.domains[: len(run.domains)]) == set(run.domains)  # they take turns
        some = workload_of(run, max_tokens=20_000)
        assert 15_000 < some.num_passes < 25_000
        assert set(some.domains) == set(run.domains)
        code = workload_of(run, domains=["python"])
        assert set(code.domains) == {"python"}
        with pytest.raises(PlanError, match="no domain 'klingon'; it has arithmetic"):
            workload_of(run, domains=["klingon"])
        with pytest.raises(PlanError, match="no token that uses an expert"):
            workload_of(run, phase="decode")  # the sample was read, not generated


def test_what_cannot_be_a_workload() -> None:
    ids, _ = _selections(3)
    work = decode(selections=ids, num_experts=6)
    for size in (0, -1):
        with pytest.raises(PlanError, match=f"batch {size} is no number"):
            batched(work, size=size)
        with pytest.raises(PlanError, match=f"chunk {size} is no number"):
            prefill(work, chunk=size)
    with pytest.raises(PlanError, match="cannot be put together again"):
        prefill(batched(work, size=2), chunk=2)
    with pytest.raises(MetricError, match="id 5"):
        decode(selections=ids, num_experts=5)


def test_passes_of_more_tokens_than_can_be_counted() -> None:
    work = decode(selections=np.zeros((1, 1, 65_536, 1), np.int16), num_experts=2)
    assert prefill(work, chunk=65_535).tokens.max() == 65_535
    with pytest.raises(PlanError, match="a pass of 65,536 tokens is too long: give 65,535 at most"):
        prefill(work, chunk=1 << 20)


def _sum(column: str):
    import polars as pl

    return pl.col(column).sum()
