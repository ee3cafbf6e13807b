"""Caches with prefetching against plain Python, and against the stack of all LRU caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.simulate.prefetch.corrupted import predict as corrupted
from planner.simulate.prefetch.predicted import Predicted
from planner.simulate.prefetch.replay import replay_prefetch
from planner.simulate.prefetch.score import score
from planner.simulate.replay import replay
from planner.simulate.workload import Workload, batched
from tests.planner.workloads import drawn_workload, of_selections, sets_of


def _plain(
    work: Workload, predicted: Predicted, slots: list[int], shared: bool, limit: int, demote: bool
) -> dict[str, Any]:
    """The same replay with lists, oldest first: counts of every step and of the whole."""
    layers, passes = work.ids.shape[:2]
    caches: list[list[tuple[int, int]]] = [[] for _ in slots]
    unused: set[tuple[int, int]] = set()
    due: list[set[tuple[int, int]]] = []  # what predictions under way name
    missing, fetched, useful = (np.zeros((layers, passes), int) for _ in range(3))

    def named(ids: Any, layer: int) -> list[tuple[int, int]]:
        return [(layer, int(one)) for one in ids if one >= 0]

    def admit(where: int, item: tuple[int, int], victims: list[tuple[int, int]]) -> bool:
        if len(caches[where]) >= slots[where]:
            if not victims:
                return False
            caches[where].remove(victims[0])
            unused.discard(victims[0])
        caches[where].append(item)
        return True

    for step in range(layers * passes):
        one, layer = divmod(step, layers)
        where = 0 if shared else layer
        if step >= predicted.ahead and limit:
            due.pop(0)
        masked = set().union(*due)
        needs = named(work.ids[layer, one], layer)
        for item in needs:
            if item in caches[where]:
                useful[layer, one] += item in unused
                unused.discard(item)
                caches[where].remove(item)
                caches[where].append(item)
            else:
                missing[layer, one] += 1
                free = [old for old in caches[where] if old not in needs]
                admit(where, item, [old for old in free if old not in masked] or free)
        if demote:
            for item in named(predicted.ids[layer, one], layer):
                if item in unused:
                    caches[where].remove(item)
                    caches[where].insert(0, item)
        later, ahead_layer = divmod(step + predicted.ahead, layers)
        if limit and later < passes:
            where = 0 if shared else ahead_layer
            due.append(set(named(predicted.ids[ahead_layer, later], ahead_layer)))
            masked = set().union(*due)
            for item in named(predicted.ids[ahead_layer, later], ahead_layer):
                if item in caches[where]:
                    continue
                if fetched[ahead_layer, later] == limit:
                    break
                if not admit(where, item, [old for old in caches[where] if old not in masked and old not in needs]):
                    break
                unused.add(item)
                fetched[ahead_layer, later] += 1
    return {"missing": missing, "fetched": fetched, "useful": useful}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("demote", [False, True])
@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("limit", [0, 1, 9])
def test_a_replay_does_what_lists_do(shared: bool, demote: bool, ahead: int, limit: int) -> None:
    generator = np.random.default_rng(ahead * 100 + limit)
    for trial in range(6):
        work = drawn_workload(trial, layers=3, experts=7, k=2, length=12, skew=0.2)
        if trial % 2:
            work = batched(work, size=2)
        across = ahead == 4 or trial > 2
        if across:
            ids = np.argsort(generator.random((3, work.num_passes, 7)), axis=2)[:, :, :3].astype(np.int16)
            ids[generator.random(ids.shape) < 0.2] = -1
            foreseen = Predicted("any", ids, ahead)
        else:
            foreseen = corrupted(work, train=work, accuracy=0.6, ahead=ahead, seed=trial)
        slots = [int(generator.integers(2, 16))] if shared else generator.integers(0, 7, 3).tolist()
        expected = _plain(work, foreseen, slots, shared, limit, demote)
        sizes: dict[str, Any] = {"slots": slots[0], "shared": True} if shared else {"layer_slots": slots}
        found = replay_prefetch(work, foreseen, limit=limit, demote=demote, **sizes)
        np.testing.assert_array_equal(found.outcome.missing, expected["missing"])
        np.testing.assert_array_equal(found.fetched, expected["fetched"])
        np.testing.assert_array_equal(found.useful, expected["useful"])
        assert found.wasted == expected["fetched"].sum() - expected["useful"].sum() >= 0
        assert found.outcome.hits.sum() == work.needed.sum() - expected["missing"].sum()
        assert found.outcome.stalled.sum() == (expected["missing"] > 0).sum()
        room = np.array(slots * 3 if shared else slots)[:, None]
        assert found.outcome.overflow == (work.needed > room).sum()


def test_without_fetches_it_is_the_stack_of_lru_caches() -> None:
    from profiler.metrics._stack import Policy, request_depths

    work = drawn_workload(1, layers=2, experts=9, k=3, length=60, skew=0.2)
    nothing = corrupted(work, train=work, accuracy=0.5)
    offsets = np.array([0, work.num_passes], np.int64)
    for layer in range(2):
        depths = np.empty((work.num_passes, 3), np.int32)
        request_depths(work.ids[layer].astype(np.int32), offsets, 9, Policy.LRU, 1, True, depths)
        for slots in range(3, 10):
            found = replay_prefetch(work, nothing, slots=slots, limit=0).outcome
            np.testing.assert_array_equal(found.missing[layer], (depths >= slots).sum(axis=1))
            assert found.policy == "lru" and found.slots == 2 * slots


@pytest.mark.parametrize("shared", [False, True])
def test_without_fetches_it_is_the_replay_of_lru(shared: bool) -> None:
    work = batched(drawn_workload(1, layers=3, experts=9, k=3, requests=6, length=60, skew=0.2), size=2)
    nothing = corrupted(work, train=work, accuracy=0.5)
    for slots in (2, 7, 12):
        one = replay_prefetch(work, nothing, slots=slots, shared=shared, limit=0).outcome
        other = replay(work, policy="lru", slots=slots, shared=shared)
        for name in ("policy", "slots", "overflow"):
            assert getattr(one, name) == getattr(other, name)
        for name in ("missing", "uses", "hits", "stalled", "steps"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_known_routes_leave_nothing_to_load_but_the_first_layers() -> None:
    work = drawn_workload(2, layers=4, experts=9, k=3, requests=3, length=40)
    found = replay_prefetch(work, corrupted(work, train=work, accuracy=1.0), slots=3)
    assert found.outcome.missing[1:].sum() == 0 and found.wasted == 0 and found.wasted_share == 0.0
    plain = replay_prefetch(work, corrupted(work, train=work, accuracy=1.0), slots=3, limit=0)
    assert found.loads == plain.loads  # fetched instead of loaded: prefetching moves loads, it does not save them
    across = replay_prefetch(work, corrupted(work, train=work, accuracy=1.0, across_passes=True), slots=3)
    stalled = np.flatnonzero(across.outcome.missing.any(axis=0))
    assert 0 in stalled and set(stalled.tolist()) <= {0, 40, 80}  # only first passes of requests
    assert across.outcome.missing[1:].sum() == 0


def test_wrong_predictions_push_out_what_is_used() -> None:
    work = drawn_workload(3, experts=12, k=2, requests=4, length=200, skew=0.4)
    wrong = corrupted(work, train=work, accuracy=0.0)
    plain, spoiled = (replay_prefetch(work, wrong, slots=4, limit=limit) for limit in (0, None))
    assert spoiled.outcome.hit_rate < plain.outcome.hit_rate
    assert spoiled.loads > plain.loads
    best = replay_prefetch(work, wrong, slots=4, demote=True)
    assert best.outcome.hit_rate >= spoiled.outcome.hit_rate - 0.02


def test_by_hand() -> None:
    work = of_selections([[[[0], [1], [2], [0]]], [[[0], [1], [0], [3]]]], 4)
    ids = np.array([[[-1], [-1], [-1], [-1]], [[0], [2], [0], [1]]], np.int16)
    found = replay_prefetch(work, Predicted("any", ids, 1), slots=2)
    # layer 1: fetch 0, use it; fetch 2 in vain, load 1 in place of 0; fetch 0 in place of 2, use it; 1 is there, load 3
    assert found.fetched.tolist() == [[0] * 4, [1, 1, 1, 0]]
    assert found.useful.tolist() == [[0] * 4, [1, 0, 1, 0]]
    assert found.outcome.missing.tolist() == [[1, 1, 1, 1], [0, 1, 0, 1]]
    assert found.wasted == 1


def test_a_score_counts_what_sets_say() -> None:
    work = drawn_workload(4, layers=3, experts=8, k=3, requests=5, length=20)
    foreseen = corrupted(work, train=work, accuracy=0.6, width=2)
    done, plain = score(foreseen, work, slots=4), score(foreseen, work)
    cached: list[list[int]] = [[] for _ in range(3)]  # oldest first
    counts = dict.fromkeys(("needed", "foreseen", "right", "exact", "missing", "caught", "fetched"), 0)
    for one in range(work.num_passes):
        for layer in range(3):
            needs, guess = sets_of(work.ids[layer, one]), sets_of(foreseen.ids[layer, one])
            held = set(cached[layer])
            if layer > 0:
                for name, count in (
                    ("needed", len(needs)), ("foreseen", len(guess)), ("right", len(needs & guess)),
                    ("exact", needs <= guess), ("missing", len(needs - held)), ("caught", len((needs - held) & guess)),
                    ("fetched", len(guess - held)),
                ):  # fmt: skip
                    counts[name] += count
            for expert in work.ids[layer, one].tolist():
                if expert in cached[layer]:
                    cached[layer].remove(expert)
                elif len(cached[layer]) == 4:
                    cached[layer].remove(next(old for old in cached[layer] if old not in needs))
                cached[layer].append(expert)
    for name, count in counts.items():
        assert getattr(done, name).sum() == count, name
    assert plain.missing.sum() == counts["needed"] and plain.recall_of_missing == plain.recall
    assert done.wasted_bytes(10.0) == 10.0 * (counts["fetched"] - counts["caught"]) / 100
    assert done.chance_recall == pytest.approx(2 / 8)
    np.testing.assert_allclose(np.nanmean(done.per_request()), done.recall)


def test_caches_that_cannot_be_are_refused() -> None:
    work = drawn_workload(0)
    foreseen = corrupted(work, train=work, accuracy=1.0)
    for given, message in (
        ({"slots": -1}, "0 or more"),
        ({"layer_slots": [4, 4]}, "2 entries; the workload has 3"),
        ({"layer_slots": [4, 4, 4], "shared": True}, "of one shared cache"),
        ({}, "takes slots"),
        ({"slots": 4, "limit": -1}, "limit -1"),
    ):
        with pytest.raises(PlanError, match=message):
            replay_prefetch(work, foreseen, **given)
