"""Adapters' experts: the memory factor, the maps, and workloads remapped to slots."""

from __future__ import annotations

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place.adapters import BASE, adapter_maps, memory_factor, remapped
from planner.place.score import score
from planner.place.slots import contiguous
from planner.simulate.workload import Workload, batched, decode


def _work(layers: int = 2, experts: int = 6, requests: int = 4, tokens: int = 10) -> Workload:
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(experts), (layers, requests, tokens, 1)), axis=-1)[..., :2]
    return decode(selections=ids.astype(np.int16), num_experts=experts)


def test_the_papers_factor_of_ten_adapters() -> None:
    # 26 MoE layers of 64 experts as DeepSeek-V2-Lite's, ten adapters that replace up to 13 each: 1.51 (arXiv
    # 2508.17624) holds where they replace 6.45 on average, half of the slots kept for them.
    tuned = np.tile(np.array([13, 12, 10, 8, 6, 5, 4, 3, 2, 1]), (26, 1))
    tuned[::2, -1] = 2
    assert memory_factor(tuned=tuned, num_experts=64) == pytest.approx(1.51, abs=0.005)


def test_the_factor_by_hand() -> None:
    # two layers of 4 experts and two adapters with room for 2: 16 slots, of which 8 + 4 are in use
    assert memory_factor(tuned=[[2, 1], [1, 0]], num_experts=4) == pytest.approx(16 / 12)
    assert memory_factor(tuned=[[2, 2], [2, 2]], num_experts=4) == 1.0
    with pytest.raises(PlanError, match="adapters replace 1 to 3 experts with room for 2"):
        memory_factor(tuned=[[3, 1]], num_experts=4, most=2)


def test_maps_lead_to_the_base_or_behind_it() -> None:
    maps = adapter_maps(tuned=[[[1, 3], []], [[0], [2, 3]]], num_experts=4)
    assert maps.slots[0].tolist() == [[0, 4, 2, 5], [6, 1, 2, 3]]
    assert maps.slots[1].tolist() == [[0, 1, 2, 3], [0, 1, 6, 7]]
    assert maps.num_slots == 8 and maps.tuned.tolist() == [[2, 1], [0, 2]]
    assert maps.memory_factor == pytest.approx(2 * 8 / (2 * 4 + 5))
    assert maps.sparsity().tolist() == [0.5, 0.25]


def test_a_remapped_workload_is_what_each_request_would_see() -> None:
    work = _work()
    maps = adapter_maps(tuned=[[[1, 3], [0]], [[0], [2, 3]]], num_experts=6)
    chosen = [0, BASE, 1, 0]
    there = remapped(work, maps, chosen)
    assert there.num_experts == maps.num_slots == 10
    for layer in range(2):
        for token, request in enumerate(work.request_of_pass):
            before, after = work.ids[layer, token], there.ids[layer, token]
            adapter = chosen[request]
            expected = before if adapter == BASE else maps.slots[layer, adapter, before]
            assert after.tolist() == expected.tolist()
    united = batched(there, size=4)  # one pass of four requests: the same expert of two adapters is two objects
    assert united.counts().sum() == work.counts().sum()
    assert united.needed.sum() > batched(work, size=4).needed.sum()
    assert score(there, contiguous(num_layers=2, num_experts=10, devices=2)).load.sum() == work.counts().sum()


def test_what_does_not_fit_together() -> None:
    work, maps = _work(), adapter_maps(tuned=[[[1], [0]]], num_experts=6)
    with pytest.raises(PlanError, match="2 adapters for 4 requests"):
        remapped(work, maps, [0, 0])
    with pytest.raises(PlanError, match="there is no adapter 1: there are 1"):
        remapped(work, maps, [0, 1, 0, 0])
    with pytest.raises(PlanError, match="start from single tokens"):
        remapped(batched(work, size=2), maps, [0, 0])
    with pytest.raises(PlanError, match=r"replaces experts \[7\] of layer 0: name each once, of 0 to 5"):
        adapter_maps(tuned=[[[7], [0]]], num_experts=6)
    with pytest.raises(PlanError, match=r"adapters have \[1, 2\] layers"):
        adapter_maps(tuned=[[[1]], [[1], [2]]], num_experts=6)
