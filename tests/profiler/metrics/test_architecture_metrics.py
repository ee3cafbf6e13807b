"""Metrics of architectures' own axes against plain loops, and against what was planted."""

from __future__ import annotations

from collections import Counter
from math import log2
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from moescope.errors import MetricError
from profiler.metrics import axis_distance as axes
from profiler.metrics import (
    chained_steps,
    expert_kinds,
    imbalance,
    layer_memory,
    neighbours,
    router_rows,
    shared_output,
)
from profiler.metrics.load import balance, load_balance_loss
from profiler.metrics.transitions import transition_counts, transition_information


def random_ids(tokens: int, k: int, experts: int, seed: int) -> NDArray[np.int16]:
    return np.argsort(np.random.default_rng(seed).random((tokens, experts)), axis=1)[:, :k].astype(np.int16)


def test_a_loss_that_is_satisfied_though_the_load_is_skewed() -> None:
    counts = np.array([[700.0, 100, 100, 100], [700, 100, 100, 100], [250, 250, 250, 250]])
    sums = np.array([[250.0, 250, 250, 250], [700, 100, 100, 100], [400, 300, 200, 100]])
    loss = load_balance_loss(counts=counts, probability_sums=sums, tokens=1000.0, top_k=1).mean_form
    assert_allclose(loss[0], 1.0)  # nothing to lower, with max load 2.8 times the mean
    seen = imbalance.seen_imbalance(counts=counts, probability_sums=sums)
    assert_allclose(seen[:2], [0.0, 1.0], atol=1e-12)
    assert np.isnan(seen[2])
    assert_allclose(imbalance.probability_cv(probability_sums=sums), balance(load=sums).cv)
    # For any load: the slope of the regression of P on f, whatever k.
    rng = np.random.default_rng(0)
    used, probability = rng.random((1, 16)), rng.random((1, 16))
    slope = np.polyfit((used / used.mean())[0], (probability / probability.mean())[0], 1)[0]
    assert_allclose(imbalance.seen_imbalance(counts=2 * used, probability_sums=probability), [slope])


def test_shared_over_routed_output() -> None:
    rng = np.random.default_rng(1)
    shared, routed = rng.normal(size=(50, 8)), 3 * rng.normal(size=(50, 8))
    found = shared_output.shared_ratio(shared_square_sum=(shared**2).sum(), routed_square_sum=(routed**2).sum())
    norms = [np.sqrt(np.mean(np.linalg.norm(part, axis=1) ** 2)) for part in (shared, routed)]
    assert_allclose(found, norms[0] / norms[1])
    assert_allclose(shared_output.root_mean_square(square_sum=(shared**2).sum(), tokens=50), norms[0])
    assert np.isnan(shared_output.shared_ratio(shared_square_sum=1.0, routed_square_sum=0.0))


def test_kinds_of_the_selections_against_a_loop() -> None:
    kinds = ["routed"] * 3 + ["copy", "zero"]
    ids, group = random_ids(200, 2, 5, 2), np.random.default_rng(3).integers(-1, 3, 200)
    ids[::7, 1] = -1
    counts = expert_kinds.kind_counts(ids=ids, kinds=expert_kinds.kind_index(kinds=kinds), group=group, num_groups=3)
    plain = Counter((int(group[t]), kinds[e]) for t in range(200) for e in ids[t] if e >= 0 and group[t] >= 0)
    for one in range(3):
        for at, kind in enumerate(expert_kinds.KINDS):
            assert counts[one, at] == plain[one, kind]
    assert_allclose(expert_kinds.kind_share(counts=counts).sum(axis=1), 1.0)
    tokens = np.array([(group == one).sum() for one in range(3)])
    computed = [np.mean([(ids[t] >= 0).sum() - np.isin(ids[t], (3, 4)).sum() for t in np.flatnonzero(group == one)])
                for one in range(3)]  # fmt: skip
    assert_allclose(expert_kinds.computed_experts(counts=counts, tokens=tokens), computed)
    with pytest.raises(MetricError, match="'frozen' is none of routed, zero"):
        expert_kinds.kind_index(kinds=["routed", "frozen"])


def test_repeats_between_steps_against_a_loop() -> None:
    first, second = random_ids(300, 2, 6, 4), random_ids(300, 2, 6, 5)
    second[:100] = first[:100]
    offsets = np.array([0, 300])
    counts = transition_counts(first=first, second=second, offsets=offsets, num_experts=[6, 6])[0]
    loads = [np.bincount(ids.ravel(), minlength=6) for ids in (first, second)]
    plain = np.mean([len(set(a) & set(b)) / 2 for a, b in zip(first.tolist(), second.tolist(), strict=True)])
    assert_allclose(chained_steps.step_repeat(counts=counts, later=loads[1]), plain)
    chance = chained_steps.repeat_by_popularity(earlier=loads[0], later=loads[1], tokens=300)
    rng = np.random.default_rng(6)
    drawn = [
        np.mean(
            [len(set(a) & set(b)) / 2 for a, b in zip(first.tolist(), rng.permutation(second).tolist(), strict=True)]
        )
        for _ in range(200)
    ]
    assert_allclose(chance, np.mean(drawn), atol=0.005)
    with pytest.raises(MetricError, match="steps of 6 and 4 experts"):
        chained_steps.step_repeat(counts=np.zeros((6, 4)), later=np.zeros(4))


def test_distances_along_an_axis_against_a_loop() -> None:
    ids, place = random_ids(400, 2, 7, 7), np.random.default_rng(8).integers(-1, 4, 400)
    counts = axes.axis_counts(ids=ids, place=place, num_values=4, num_experts=7)
    plain = Counter((int(place[t]), int(e)) for t in range(400) for e in ids[t] if place[t] >= 0)
    assert all(counts[value, expert] == plain[value, expert] for value in range(4) for expert in range(7))
    pooled = counts.sum(axis=0) / counts.sum()
    expected = [0.5 * sum(abs(counts[v, e] / counts[v].sum() - pooled[e]) for e in range(7)) for v in range(4)]
    assert_allclose(axes.axis_distance(counts=counts), expected)
    apart = axes.axis_distance(counts=np.array([[5, 0, 0], [0, 5, 0], [0, 0, 0]]))
    assert_allclose(apart[:2], 0.5)
    assert np.isnan(apart[2])
    with pytest.raises(MetricError, match="beyond value 1"):
        axes.axis_counts(ids=ids, place=place, num_values=2, num_experts=7)


def entropy(*columns: NDArray[np.int64]) -> float:
    """Joint entropy of columns, bits, by a dictionary."""
    counted = Counter(zip(*(column.tolist() for column in columns), strict=True))
    total = sum(counted.values())
    return -sum(n / total * log2(n / total) for n in counted.values())


def test_entropies_of_choices_against_dictionaries() -> None:
    first, second = random_ids(500, 2, 6, 9), random_ids(500, 3, 8, 10)
    second[:, 0] = np.where(np.arange(500) % 2, first[:, 0], second[:, 0])
    counts = transition_counts(first=first, second=second, offsets=np.array([0, 500]), num_experts=[6, 8])[0]
    pairs = np.array([(a, b) for t in range(500) for a in first[t] for b in second[t]])
    assert_allclose(
        layer_memory.conditional_entropy(counts=counts), entropy(pairs[:, 0], pairs[:, 1]) - entropy(pairs[:, 0])
    )
    assert_allclose(layer_memory.choice_entropy(counts=counts.sum(axis=0)), entropy(pairs[:, 1]))
    gained = layer_memory.choice_entropy(counts=counts.sum(axis=0)) - layer_memory.conditional_entropy(counts=counts)
    assert_allclose(gained, transition_information(counts=counts))
    assert np.isnan(layer_memory.choice_entropy(counts=np.zeros(3)))
    assert np.isnan(layer_memory.conditional_entropy(counts=np.zeros((3, 3))))


@pytest.mark.parametrize("cells", [1, 1 << 21])
def test_memory_of_two_layers(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(layer_memory, "MOST_CELLS", cells)  # counted by sorting, or in a table
    rng = np.random.default_rng(11)
    two, one = (rng.integers(0, 4, 6000) for _ in range(2))
    part = np.repeat(np.arange(4), 1500)
    common: dict[str, Any] = {"one_back": one, "part": part, "num_parts": 4}
    both = (two + one) % 4  # needs both: neither says anything alone
    value, without = layer_memory.memory_information(two_back=two, chosen=both, **common)
    assert_allclose(value, entropy(two, one) + entropy(one, both) - entropy(one) - entropy(two, one, both))
    kept = part != 2
    assert_allclose(
        without[2],
        layer_memory.memory_information(
            two_back=two[kept], one_back=one[kept], chosen=both[kept], part=part[kept], num_parts=4
        )[0],
    )
    assert value > 1.99
    # A chain remembers one layer alone: what is left is what exchanged choices show too.
    chain = np.where(rng.random(6000) < 0.7, one, rng.integers(0, 4, 6000))
    linked = np.where(rng.random(6000) < 0.7, one, rng.integers(0, 4, 6000))
    dealt = layer_memory.exchanged(two_back=linked, one_back=one, seed=0)
    for expert in range(4):
        assert sorted(dealt[one == expert]) == sorted(linked[one == expert])
    observed, nothing = (
        layer_memory.memory_information(two_back=earlier, chosen=chain, **common)[0] for earlier in (linked, dealt)
    )
    assert observed < 0.01
    assert nothing < 0.01
    none = layer_memory.memory_information(two_back=np.full(6000, -1), chosen=chain, **common)
    assert np.isnan(none[0])


def test_neighbours_find_the_expert_that_was_carried_over() -> None:
    rng = np.random.default_rng(12)
    first, second = rng.normal(size=(5, 64)), rng.normal(size=(6, 64))
    second[3] = 2.5 * first[1]
    second[4] = 0.0
    found = neighbours.neighbour_similarity(first=first, second=second)
    plain = [max(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in first) for b in second if b.any()]
    assert_allclose(found[[0, 1, 2, 3, 5]], plain)
    assert_allclose(found[3], 1.0)
    assert np.isnan(found[4])
    own = neighbours.own_similarity(vectors=first)
    assert_allclose(own[0], max(neighbours.cosines(first=first, second=first)[0, 1:]))
    with pytest.raises(MetricError, match="both take"):
        neighbours.cosines(first=first, second=second[:, :10])


def test_random_router_rows_read_as_random_and_planted_ones_do_not() -> None:
    rng = np.random.default_rng(13)
    rows = rng.normal(size=(64, 256))
    found = router_rows.router_rows(rows=rows)
    assert len(found.cosines) == 64 * 63 // 2
    assert_allclose(found.cosines[0], rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1]))
    assert abs(found.spread - 1) < 0.05
    assert abs(found.mean) < 0.01
    assert abs(found.norm_cv / found.chance_norm_cv - 1) < 0.25
    assert found.near_copies == 0
    # In half of all cases the largest of so many random cosines lies above what is said.
    size = (400, 8, 32)
    largest = [router_rows.router_rows(rows=drawn) for drawn in rng.normal(size=size)]
    above = np.mean([one.largest > one.chance_largest for one in largest])
    assert 0.35 < above < 0.65
    copied = np.concatenate([rows, rows[:1] + 0.01 * rng.normal(size=(1, 256))])
    assert router_rows.router_rows(rows=copied).near_copies == 1
    shifted = router_rows.router_rows(rows=rows + 1.0)
    assert shifted.mean > 0.4
    assert shifted.spread > 5
    edges = np.linspace(-1, 1, 4001)
    density = router_rows.chance_density(cosine=edges, size=32)
    assert_allclose(np.trapezoid(density, edges), 1.0, atol=1e-3)
    assert_allclose(np.trapezoid(density * edges**2, edges), 1 / 32, rtol=1e-3)
    with pytest.raises(MetricError, match="two or more"):
        router_rows.router_rows(rows=rows[:1])
