"""Co-activation, transitions and lookahead: by hand, and against slow obvious versions on the reference traces."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference_values import NAMES, reference
from simulators import random_selections

from moescope.errors import MetricError
from profiler.metrics import co_activation, lookahead, transitions
from profiler.metrics._trace import Trace
from profiler.metrics.controls import uniform_experts

HAND = np.array([[0, 1], [0, 2], [0, 1], [1, 2], [-1, -1], [3, 0]], np.int16)
"""Five tokens that use two of four experts, and one that uses none."""


def traces() -> list[Any]:
    found = [pytest.param(*reference(name)[:2], id=name) for name in NAMES]
    return [*found, pytest.param(random_selections(3, k=3), 6, id="ragged")]


def used(trace: Trace, layer: int) -> NDArray[np.int64]:
    """(tokens, experts) 0/1."""
    hot = np.zeros((len(trace.layer(layer)), trace.num_experts), np.int64)
    for token, ids in enumerate(trace.layer(layer)):
        hot[token, [expert for expert in ids if expert >= 0]] = 1
    return hot


def test_pairs_by_hand() -> None:
    counts = co_activation.pair_counts(ids=HAND, offsets=np.array([0, 4, 6]), num_experts=5)
    assert counts.shape == (1, 5, 5)
    pairs = counts[0]
    assert np.diag(pairs).tolist() == [4, 3, 2, 1, 0]
    assert [pairs[0, 1], pairs[0, 2], pairs[1, 2], pairs[0, 3], pairs[1, 3]] == [2, 1, 1, 1, 0]
    given = co_activation.conditional(pairs=pairs)
    assert given[0, 1] == pytest.approx(2 / 4) and given[1, 0] == pytest.approx(2 / 3)
    assert np.isnan(given[0, 0]) and np.isnan(given[4]).all()
    assert co_activation.lift(pairs=pairs, tokens=5)[0, 1] == pytest.approx(2 * 5 / (4 * 3))
    assert co_activation.jaccard(pairs=pairs)[0, 1] == pytest.approx(2 / (4 + 3 - 2))
    information = co_activation.pointwise_information(pairs=pairs, tokens=5)
    assert information[0, 1] == pytest.approx(np.log2(10 / 12)) and information[1, 3] == -np.inf
    assert np.isnan(information[4, 0])


@pytest.mark.parametrize(("selections", "experts"), traces())
def test_counts_equal_products_of_indicators(selections: NDArray[Any], experts: int) -> None:
    trace = Trace.of(selections, experts)
    part = np.arange(len(trace.lengths)) % 2
    owner = np.repeat(part, trace.lengths)
    for layer in range(trace.num_layers):
        hot = used(trace, layer)
        found = co_activation.pair_counts(
            ids=trace.layer(layer), offsets=trace.offsets, num_experts=experts, part=part, num_parts=2
        )
        for half in (0, 1):
            np.testing.assert_array_equal(found[half], hot[owner == half].T @ hot[owner == half])
    before, after = used(trace, 0), used(trace, 1)
    found = transitions.transition_counts(
        first=trace.layer(0), second=trace.layer(1), offsets=trace.offsets, num_experts=(experts, experts)
    )
    np.testing.assert_array_equal(found[0], before.T @ after)


def test_quasi_independence_of_two_choices_is_what_produced_them() -> None:
    # Two independent choices that happen to differ: pairs proportional to q_i q_j, which the fit gives back.
    weights = np.array([0.5, 0.2, 0.2, 0.1])
    pairs = 1000 * np.outer(weights, weights)
    np.fill_diagonal(pairs, 0)
    np.fill_diagonal(pairs, pairs.sum(axis=1))
    np.testing.assert_allclose(co_activation.expected(pairs=pairs)[0, 1:], pairs[0, 1:], rtol=1e-9)
    assert co_activation.pair_excess(pairs=pairs) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(co_activation.attraction(pairs=pairs)[1, [0, 2, 3]], 1)


@pytest.mark.parametrize(("selections", "experts"), traces())
def test_expected_pairs_keep_every_experts_pairs(selections: NDArray[Any], experts: int) -> None:
    trace = Trace.of(selections, experts)
    pairs = co_activation.pair_counts(ids=trace.layer(0), offsets=trace.offsets, num_experts=experts)[0]
    fitted = co_activation.expected(pairs=pairs)
    np.testing.assert_allclose(fitted, fitted.T)
    np.testing.assert_allclose(np.nansum(fitted, axis=1), pairs.sum(axis=1) - np.diag(pairs), rtol=1e-6, atol=1e-6)
    distance = sum(abs(pairs[i, j] - fitted[i, j]) for i, j in product(range(experts), repeat=2) if i != j)
    share = distance / 2 / (pairs.sum() - np.trace(pairs))
    assert co_activation.pair_excess(pairs=pairs) == pytest.approx(share)


def test_experts_that_always_meet_stand_out_and_random_ones_do_not() -> None:
    random = uniform_experts(selections=np.zeros((1, 10, 2000, 3), np.int16), num_experts=12, seed=0)
    trace = Trace.of(random, 12)
    counts = {"random": co_activation.pair_counts(ids=trace.layer(0), offsets=trace.offsets, num_experts=12)[0]}
    twins = trace.layer(0).copy()
    twins[:, 0] = 2 * (twins[:, 0] % 6)
    twins[:, 1] = twins[:, 0] + 1
    twins[:, 2] = (twins[:, 0] + 2 + twins[:, 2] % 10) % 12
    counts["twins"] = co_activation.pair_counts(ids=twins, offsets=trace.offsets, num_experts=12)[0]
    noise = co_activation.chance_excess(pairs=counts["random"], seed=1)
    assert np.quantile(noise, 0.01) * 0.8 < co_activation.pair_excess(pairs=counts["random"]) < noise.max() * 1.2
    assert (
        co_activation.pair_excess(pairs=counts["twins"]) > 5 * co_activation.chance_excess(pairs=counts["twins"]).max()
    )
    attraction = co_activation.attraction(pairs=counts["twins"])
    assert np.nanargmax(attraction[4]) == 5 and np.nanargmax(attraction[5]) == 4
    chance = co_activation.conditional_chance(num_experts=12, top_k=3)
    assert chance == pytest.approx(2 / 11)
    assert np.nanmean(co_activation.conditional(pairs=counts["random"])) == pytest.approx(chance, rel=1e-3)
    lift = co_activation.lift(pairs=counts["random"], tokens=20_000)
    assert np.nanmean(lift) == pytest.approx(co_activation.lift_chance(num_experts=12, top_k=3), rel=1e-2)


def test_no_pairs_say_nothing() -> None:
    pairs = np.diag([3, 4])  # k = 1
    assert np.isnan(co_activation.pair_excess(pairs=pairs))
    assert np.isnan(co_activation.chance_excess(pairs=pairs)).all()
    assert np.isnan(co_activation.attraction(pairs=pairs)).all()
    with pytest.raises(MetricError, match="experts by experts"):
        co_activation.jaccard(pairs=[1, 2])


def test_information_by_hand() -> None:
    assert transitions.transition_information(counts=[[5, 0], [0, 5]]) == pytest.approx(1)
    assert transitions.transition_information(counts=[[2, 4], [1, 2]]) == pytest.approx(0)
    assert np.isnan(transitions.transition_information(counts=np.zeros((2, 2))))
    table = np.array([[3.0, 1, 0], [1, 2, 2]])
    joint = table / table.sum()
    outer = np.outer(joint.sum(1), joint.sum(0))
    expected = sum(joint[i, j] * np.log2(joint[i, j] / outer[i, j]) for i, j in np.argwhere(joint))
    found = transitions.transition_information(counts=np.stack([table, 7 * table]))
    np.testing.assert_allclose(found, expected)
    assert transitions.transition_shares(counts=table)[0] == pytest.approx([0.75, 0.25, 0])
    assert transitions.transition_lift(counts=table)[0, 0] == pytest.approx(joint[0, 0] / outer[0, 0])


def test_information_of_unrelated_layers_is_the_stated_error() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 8, (2, 4000, 1)).astype(np.int16)
    counts = transitions.transition_counts(first=first, second=second, offsets=np.array([0, 4000]), num_experts=(8, 8))
    assert transitions.transition_information(counts=counts)[0] == pytest.approx(49 / (2 * 4000 * np.log(2)), rel=0.4)


def slow_foreseen(
    first: NDArray[Any], second: NDArray[Any], table: NDArray[np.float64], top_k: int
) -> NDArray[np.float64]:
    sums = np.zeros(2 + transitions.EXTRA)
    for before, after in zip(first, second, strict=True):
        scores = np.zeros(table.shape[1])
        for expert in before:
            scores += table[expert] if expert >= 0 else 0
        ranked = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
        for expert in after:
            if expert >= 0:
                sums[0] += 1
                for extra in range(transitions.EXTRA + 1):
                    sums[1 + extra] += expert in ranked[: top_k + extra]
    return sums


@pytest.mark.parametrize(("selections", "experts"), traces())
def test_foreseen_equals_sorting_every_token(selections: NDArray[Any], experts: int) -> None:
    trace = Trace.of(selections[:, :6, :40], experts)
    first, second = trace.layer(0), trace.layer(1)
    sequences, k = len(trace.lengths), trace.top_k
    fold, group = np.arange(sequences) % 2, np.arange(sequences) % 3
    place: dict[str, Any] = {"first": first, "second": second, "offsets": trace.offsets}
    counts = transitions.transition_counts(**place, num_experts=(experts, experts), part=fold, num_parts=2)
    tables = transitions.prediction_table(counts=counts[::-1])
    np.testing.assert_allclose(tables.sum(axis=2), 1)
    found = transitions.foreseen_sums(**place, tables=tables, fold=fold, top_k=k, group=group, num_groups=3)
    popular = np.stack([second_counts(second, trace, group == number, experts) for number in range(3)])
    owner = np.repeat(np.arange(sequences), trace.lengths)
    for number in range(3):
        expected = np.zeros(2 + transitions.EXTRA)
        for half in (0, 1):
            mine = np.isin(owner, np.flatnonzero((group == number) & (fold == half)))
            expected += slow_foreseen(first[mine], second[mine], tables[half], k)
        np.testing.assert_array_equal(found[number], expected)
        popularity = np.tile(np.arange(experts, 0, -1), (experts, 1)).astype(float)  # expert 0 is most popular
        mine = np.isin(owner, np.flatnonzero(group == number))
        by_rank = transitions.popular_sums(
            counts=popular[[number]], popularity=popularity[:1], fold=np.zeros(1, int), top_k=k
        )
        np.testing.assert_array_equal(
            by_rank[0], slow_foreseen(np.zeros_like(second[mine][:, :1]), second[mine], popularity, k)
        )


def second_counts(ids: NDArray[Any], trace: Trace, chosen: NDArray[np.bool_], experts: int) -> NDArray[np.int64]:
    mine = ids[np.repeat(chosen, trace.lengths)]
    return np.bincount(mine[mine >= 0], minlength=experts)


def test_a_layer_that_follows_from_the_one_before_is_foreseen() -> None:
    rng = np.random.default_rng(0)
    first = np.argsort(rng.random((3000, 10)), axis=1)[:, :2].astype(np.int16)
    second = ((first + 3) % 10).astype(np.int16)
    offsets = np.arange(0, 3001, 100)
    fold = np.arange(30) % 2
    counts = transitions.transition_counts(
        first=first, second=second, offsets=offsets, num_experts=(10, 10), part=fold, num_parts=2
    )
    held_out = transitions.prediction_table(counts=counts[::-1])
    common: dict[str, Any] = {
        "offsets": offsets,
        "tables": held_out,
        "fold": fold,
        "top_k": 2,
        "group": fold,
        "num_groups": 2,
    }
    found = transitions.recall(sums=transitions.foreseen_sums(first=first, second=second, **common))
    np.testing.assert_allclose(found, 1)
    shuffled = second[rng.permutation(3000)]
    counts = transitions.transition_counts(
        first=first, second=shuffled, offsets=offsets, num_experts=(10, 10), part=fold, num_parts=2
    )
    common["tables"] = transitions.prediction_table(counts=counts[::-1])
    found = transitions.recall(sums=transitions.foreseen_sums(first=first, second=shuffled, **common).sum(axis=0))
    chance = transitions.chance_recall(num_experts=10, top_k=2)
    assert chance.tolist() == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    np.testing.assert_allclose(found, chance, atol=0.025)
    assert np.isnan(transitions.recall(sums=np.zeros(3))).all()


def test_transitions_of_different_tokens_are_refused() -> None:
    with pytest.raises(MetricError, match="layers of 6 and 5 tokens"):
        transitions.transition_counts(first=HAND, second=HAND[:5], offsets=np.array([0, 6]), num_experts=(5, 5))


def test_lookahead_by_hand() -> None:
    found = lookahead.lookahead_recall(hits=[[6, 8], [0, 0]], selections=[8, 0])
    assert found[0].tolist() == [0.75, 1.0] and np.isnan(found[1]).all()
    assert lookahead.lookahead_exact(exact=[2, 4], tokens=4).tolist() == [0.5, 1.0]
