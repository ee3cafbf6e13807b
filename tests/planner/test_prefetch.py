"""Predictors against plain Python, planted structure, and what other code measured on the bundled run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from moescope.errors import PlanError
from planner.simulate.prefetch import METHODS, find
from planner.simulate.prefetch.activation_matrix import collection, priorities
from planner.simulate.prefetch.popularity import predict as by_popularity
from planner.simulate.prefetch.predicted import Predicted
from planner.simulate.prefetch.score import Score, score
from planner.simulate.prefetch.token_frequency import predict as by_token
from planner.simulate.prefetch.token_frequency import token_ids_of
from planner.simulate.prefetch.transitions import predict as by_transitions
from planner.simulate.workload import Workload, workload_of
from tests.planner.workloads import drawn_workload, of_selections, sets_of

SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"
FITTED = [one.name for one in METHODS if not one.drawn]


def _arguments(name: str, workload: Workload, train: Workload) -> dict[str, Any]:
    if name != "token_frequency":
        return {}
    return {"tokens": workload.ids[0, :, 0] + 1, "train_tokens": train.ids[0, :, 0] + 1}


def _chained(start: Workload, tables: Any) -> Workload:
    """The routes of layer 0, led on from layer to layer by tables[layer][expert]."""
    ids = start.ids.copy()
    for layer in range(1, len(ids)):
        ids[layer] = np.asarray(tables[layer - 1])[ids[layer - 1]]
    return replace(start, ids=ids)


@pytest.mark.parametrize("sets", [True, False])
def test_a_chain_of_layers_is_foreseen_whole(sets: bool) -> None:
    tables = [np.random.default_rng(layer).permutation(8) for layer in range(3)]
    train, test = (_chained(drawn_workload(seed, layers=4, experts=8, length=100), tables) for seed in (1, 2))
    done = score(by_transitions(test, train=train, sets=sets), test)
    assert done.recall == 1.0 and done.precision == 1.0 and done.exact_share == 1.0
    assert done.needed[:, 0].sum() == 0 and (done.needed[:, 1:] == 200).all()  # layer 0 counts nowhere


def test_only_pairs_of_layers_foresee_what_depends_on_two() -> None:
    def summed(seed: int) -> Workload:
        made = drawn_workload(seed, layers=4, experts=5, k=1, requests=10, length=100)
        ids = made.ids.copy()
        for layer in (2, 3):
            ids[layer] = (ids[layer - 1] + ids[layer - 2]) % 5
        return replace(made, ids=ids)

    train, test = summed(1), summed(2)
    both = score(by_transitions(test, train=train), test).per_layer()
    one = score(by_transitions(test, train=train, layers_back=1), test).per_layer()
    assert both[2] == both[3] == 1.0
    assert one[2] == pytest.approx(0.2, abs=0.06) and both[1] == pytest.approx(0.2, abs=0.06)


def _scores(train: Workload, seen: Workload, layer: int, one: int, ahead: int) -> np.ndarray:
    """Scores of one step of the module's four levels, from dictionaries of sets."""
    backs = [layer - ahead - back for back in range(2) if layer - ahead - back >= 0]
    after: dict[Any, list[int]] = defaultdict(list)
    tables = {back: np.zeros((train.num_experts,) * 2) for back in backs}
    for step in range(train.num_passes):
        chosen = sorted(sets_of(train.ids[layer, step]))
        seen_sets = [frozenset(sets_of(train.ids[back, step])) for back in backs]
        for depth in range(len(backs)):
            after[tuple(seen_sets[: depth + 1])] += [-1, *chosen]
        for back, earlier in zip(backs, seen_sets, strict=True):
            for expert in earlier:
                tables[back][expert, chosen] += 1
    score = np.zeros(train.num_experts)
    for back in backs:
        for expert in sets_of(seen.ids[back, one]):
            popular = tables[back].sum(axis=0) / tables[back].sum()
            score += (tables[back][expert] + popular) / (tables[back][expert].sum() + 1)
    score /= score.sum()
    own = [frozenset(sets_of(seen.ids[back, one])) for back in backs]
    for depth in range(len(backs)):
        row = after.get(tuple(own[: depth + 1]), [])
        if row:
            counts = np.bincount([expert for expert in row if expert >= 0], minlength=train.num_experts)
            prior = counts.sum() / row.count(-1)
            score = (counts + prior * score) / (counts.sum() + prior)
    return score


@pytest.mark.parametrize("ahead", [1, 2])
def test_transitions_rank_as_plain_python_does(ahead: int) -> None:
    train, test = drawn_workload(3, layers=4, skew=0.3), drawn_workload(4, layers=4, skew=0.3)
    found = by_transitions(test, train=train, ahead=ahead, width=4)
    assert (found.ids[:ahead] == -1).all()
    for layer in range(ahead, 4):
        for one in range(test.num_passes):
            expected = _scores(train, test, layer, one, ahead)
            chosen = found.ids[layer, one]
            assert len(sets_of(chosen)) == 4
            np.testing.assert_allclose(expected[chosen], np.sort(expected)[::-1][:4], rtol=1e-12)


def test_a_matrix_is_matched_as_plain_python_does() -> None:
    train, test = drawn_workload(5, requests=6, skew=0.2), drawn_workload(6, skew=0.2)
    stored = collection(train)
    for ahead in (1, 2):
        found = find("activation_matrix").predict(test, train=train, ahead=ahead, width=3, across_passes=True)
        for request in range(test.num_requests):
            current = np.zeros((3, 6), np.int64)
            for one in range(int(test.offsets[request]), int(test.offsets[request + 1])):
                for layer in range(3):
                    current[layer, list(sets_of(test.ids[layer, one]))] += 1
                    due, target = one + (layer + ahead) // 3, (layer + ahead) % 3
                    if due >= test.offsets[request + 1]:
                        continue
                    order = priorities(current=current, stored=stored, layer=layer if due == one else 0)[target]
                    used = np.flatnonzero(stored[:, target].sum(axis=0))
                    expected = sorted(used, key=lambda expert: (-order[expert], expert))[:3]
                    assert found.ids[target, due].tolist() == expected
            assert (found.ids[:ahead, test.offsets[request]] == -1).all()


def test_priorities_follow_the_published_formula() -> None:
    stored = np.array([[[4, 0], [1, 3], [2, 2]], [[0, 4], [4, 0], [0, 4]]])
    order = priorities(current=np.array([[2, 0], [1, 2], [0, 0]]), stored=stored, layer=1)
    expected = np.array([[0, 0], [0.25, 0.75], [0.375, 0.375]]) + np.array([[0], [1e-8], [1e-8]])
    np.testing.assert_allclose(order, expected, rtol=1e-12)


def test_kinds_of_text_are_told_apart_by_their_matrices() -> None:
    kinds = np.array([0, 1, 0, 1, 1, 0])[:, None, None] * 3
    generator = np.random.default_rng(0)
    selections = np.argsort(generator.random((4, 6, 20, 3)), axis=-1)[..., :2] + kinds
    train, test = of_selections(selections, 6).halves()
    done = score(find("activation_matrix").predict(test, train=train, width=3), test)
    assert done.recall == 1.0
    assert score(by_popularity(test, train=train, width=3), test).recall < 0.8


def test_independent_layers_give_what_popularity_gives() -> None:
    train, test = (drawn_workload(seed, skew=1.0, requests=20, length=200) for seed in (7, 8))
    popular = score(by_popularity(test, train=train), test)
    error = 4 * np.sqrt(popular.recall * (1 - popular.recall) / popular.needed.sum())
    followed = score(by_transitions(test, train=train, sets=False), test)
    assert followed.recall == pytest.approx(popular.recall, abs=error)
    assert popular.recall > popular.chance_recall + 10 * error


@pytest.mark.parametrize("name", FITTED)
def test_uniform_experts_read_chance(name: str) -> None:
    train, test = (drawn_workload(seed, experts=8, requests=10, length=200) for seed in (9, 10))
    done = score(find(name).predict(test, train=train, width=2, **_arguments(name, test, train)), test)
    assert done.recall == pytest.approx(done.chance_recall, abs=4 * np.sqrt(0.25 * 0.75 / done.needed.sum()))
    assert done.chance_recall == pytest.approx(0.25, abs=0.002)  # the token before is unknown to each first token


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("across_passes", [True, False])
def test_nothing_is_foreseen_from_what_comes_later(name: str, ahead: int, across_passes: bool) -> None:
    train, test = drawn_workload(11, layers=4, skew=0.3), drawn_workload(12, layers=4, skew=0.3)
    other = drawn_workload(13, layers=4, skew=0.3)
    given = {"train": train, "ahead": ahead, "width": 3, "across_passes": across_passes}
    given |= _arguments(name, test, train)
    whole = find(name).predict(test, **given).ids.transpose(1, 0, 2).reshape(-1, 3)
    for step in (9, 58, 97, 131):
        ids = test.ids.transpose(1, 0, 2).reshape(-1, 2).copy()
        ids[step:] = other.ids.transpose(1, 0, 2).reshape(-1, 2)[step:]
        changed = replace(test, ids=np.ascontiguousarray(ids.reshape(-1, 4, 2).transpose(1, 0, 2)))
        again = find(name).predict(changed, **given).ids.transpose(1, 0, 2).reshape(-1, 3)
        np.testing.assert_array_equal(again[: step + ahead], whole[: step + ahead])
        assert name in ("popularity", "token_frequency") or (again != whole).any()


def test_the_pass_before_foresees_the_first_layers() -> None:
    made = drawn_workload(14, layers=2, experts=7, k=1, length=50)
    ids = made.ids.copy()
    ids[1] = (ids[0] + 1) % 7
    for request in range(4):  # the last layer of each token leads to the first one of the next
        for one in range(request * 50 + 1, request * 50 + 50):
            ids[0, one] = (ids[1, one - 1] + 3) % 7
            ids[1, one] = (ids[0, one] + 1) % 7
    chain = replace(made, ids=ids)
    found = by_transitions(chain, train=chain, across_passes=True)
    first = np.isin(np.arange(200), chain.offsets)
    assert (found.ids[0, first] == -1).all()
    np.testing.assert_array_equal(found.ids[0, ~first], chain.ids[0, ~first])
    assert (by_transitions(chain, train=chain).ids[0] == -1).all()


def test_popularity_by_hand_and_by_domain() -> None:
    selections = [[[[1], [1], [2]], [[3], [3], [0]]], [[[0], [2], [2]], [[3], [3], [3]]]]
    work = of_selections(selections, 5, ["a", "b"])
    found = by_popularity(work, train=work, width=4)
    assert found.ids[1, 0].tolist() == [3, 2, 0, -1] and (found.ids[0] == -1).all()
    own = by_popularity(work, train=work, width=2, by_domain=True, across_passes=True)
    assert own.ids[1, [0, 5]].tolist() == [[2, 0], [3, -1]]
    assert own.ids[0, :, 0].tolist() == [-1, 1, 1, -1, 3, 3]


def test_the_token_before_is_repeated_within_a_request() -> None:
    work = of_selections([[[[1, 0], [2, 3]], [[4, 0], [0, 1]]]] * 2, 5)
    found = find("previous_token").predict(work, train=work, width=3)
    assert found.ids[1].tolist() == [[-1, -1, -1], [1, 0, -1], [-1, -1, -1], [4, 0, -1]]


def test_token_ids_foresee_what_they_decide() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 40, (2, 5, 60))
    routes = np.argsort(generator.random((3, 50, 6)), axis=-1)[..., :2]
    train, test = (of_selections(routes[:, each], 6) for each in tokens)
    done = score(by_token(test, train=train, tokens=tokens[1].ravel(), train_tokens=tokens[0].ravel()), test)
    assert done.recall == 1.0
    unknown = by_token(test, train=train, tokens=np.full(300, 49), train_tokens=tokens[0].ravel())
    np.testing.assert_array_equal(unknown.ids, by_popularity(test, train=train).ids)


def _sample_scores(run: store.Run, name: str, **given: Any) -> Score:
    """Either half of the requests foreseen by the other, put together."""
    first, second = workload_of(run).halves()
    a, b = (score(find(name).predict(test, train=train, **given), test)
            for train, test in ((first, second), (second, first)))  # fmt: skip
    return replace(a, needed=np.concatenate([a.needed, b.needed]), right=np.concatenate([a.right, b.right]))


def test_the_bundled_run_reads_as_its_metrics_say() -> None:
    with store.open_run(SAMPLE) as run:
        overall = run.metrics().filter(pl.col("layer").is_null() & (pl.col("control") == "observed"))
        for metric, name, given in (
            ("transition_recall", "transitions", {"layers_back": 1, "sets": False}),
            ("popularity_recall", "popularity", {}),
        ):
            for extra in (0, 2):
                row = overall.filter((pl.col("metric") == metric) & (pl.col("at") == extra)).row(0, named=True)
                found = _sample_scores(run, name, width=2 + extra, **given).recall
                assert row["low"] < found < row["high"]  # other halves of the same sequences
        better = _sample_scores(run, "transitions")
        assert better.recall > 0.5  # exact sets of two layers: far above one layer's 0.35


def test_token_ids_go_with_the_passes_of_a_run() -> None:
    with store.open_run(SAMPLE) as run:
        work = workload_of(run, domains=["french"], max_tokens=4000)
        found = token_ids_of(run, work)
        text = run.sequence_text(int(work.sequences[1]))
        assert text is not None
        np.testing.assert_array_equal(found[work.offsets[1] : work.offsets[2]], text.token_ids)
        with pytest.raises(PlanError, match="workloads of all tokens"):
            token_ids_of(run, replace(work, sequences=work.sequences[::-1] * 0 + 13))


def test_what_cannot_be_foreseen_is_refused() -> None:
    work = drawn_workload(0)
    for given, message in (
        ({"ahead": 3}, "1 to 2"),
        ({"ahead": 0}, "1 to 2"),
        ({"width": 7}, "1 to 6"),
        ({"train": drawn_workload(0, experts=8)}, "same model"),
    ):
        with pytest.raises(PlanError, match=message):
            by_transitions(work, **({"train": work} | given))
    with pytest.raises(PlanError, match="did you mean 'transitions'"):
        find("transition")
    with pytest.raises(PlanError, match="one for every pass"):
        by_token(work, train=work, tokens=np.zeros(3), train_tokens=np.zeros(40))
    with pytest.raises(PlanError, match="predict for this workload"):
        score(Predicted("none", np.zeros((2, 40, 1), np.int16), 1), work)
