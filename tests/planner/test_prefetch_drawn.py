"""Routes with mistakes in them, at a given accuracy or as a run recorded it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import store
from moescope.errors import PlanError
from planner.simulate.prefetch import find
from planner.simulate.prefetch.corrupted import predict as corrupted
from planner.simulate.prefetch.cross_layer_gate import Recorded, growth, recall_of
from planner.simulate.prefetch.cross_layer_gate import predict as by_gate
from planner.simulate.prefetch.predicted import together
from planner.simulate.prefetch.score import score
from planner.simulate.workload import Workload, batched, decode, workload_of
from tests.planner.workloads import drawn_workload, sets_of

SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"


@pytest.fixture(scope="module")
def sample() -> tuple[Workload, dict[tuple[int, str], Recorded]]:
    with store.open_run(SAMPLE) as run:
        recorded = {(far, name): recall_of(run, distance=far, input=name, first=True)
                    for far, name in ((1, "router"), (2, "residual"))}  # fmt: skip
        return workload_of(run), recorded


@pytest.mark.parametrize("accuracy", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("fixed", [True, False])
def test_routes_are_right_as_often_as_asked(accuracy: float, fixed: bool) -> None:
    work = drawn_workload(1, experts=12, k=4, requests=10, length=200, skew=0.2)
    found = corrupted(work, train=work, accuracy=accuracy, fixed=fixed)
    done = score(found, work)
    spread = np.sqrt(accuracy * (1 - accuracy) / done.needed.sum())
    assert done.recall == pytest.approx(accuracy, abs=4 * spread)
    assert done.precision == done.recall  # as many as are needed, none left out
    right = np.array([len(sets_of(a) & sets_of(b)) for a, b in
                      zip(found.ids[1:].reshape(-1, 4), work.ids[1:].reshape(-1, 4), strict=True)])  # fmt: skip
    if fixed:
        assert set(right.tolist()) == {int(np.floor(4 * accuracy)), int(np.ceil(4 * accuracy))}
    elif 0 < accuracy < 1:
        assert right.var() == pytest.approx(4 * accuracy * (1 - accuracy), rel=0.1)
    assert all(len(sets_of(one)) == 4 for one in found.ids[1:].reshape(-1, 4))


def test_wrong_experts_are_drawn_by_popularity() -> None:
    work = drawn_workload(2, layers=2, experts=5, k=1, requests=10, length=400, skew=0.5)
    found = corrupted(work, train=work, accuracy=0.0).ids[1, :, 0]
    popular, truth = work.counts()[1].astype(np.float64), work.ids[1, :, 0]
    for needed in range(5):
        others = np.where(np.arange(5) == needed, 0, popular)
        mine = found[truth == needed]
        expected = others / others.sum()
        error = 4 * np.sqrt(expected * (1 - expected) / len(mine)) + 1e-12
        assert (np.abs(np.bincount(mine, minlength=5) / len(mine) - expected) <= error).all()


def test_draws_depend_on_the_seed_alone() -> None:
    work = drawn_workload(3)
    one, again, other = (corrupted(work, train=work, accuracy=0.5, seed=seed).ids for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    with pytest.raises(PlanError, match="give 0 to 1"):
        corrupted(work, train=work, accuracy=1.5)


def _nested(k: int, experts: int, noise: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(hits, exact) per token among the k..k+8 best of noisy scores, as level lookahead counts them."""
    generator = np.random.default_rng(k)
    scores = generator.normal(size=(4000, experts))
    truth = np.argsort(-scores, axis=1)[:, :k]
    guess = np.argsort(-(scores + noise * generator.normal(size=scores.shape)), axis=1)
    place = np.argsort(guess, axis=1)
    found = np.take_along_axis(place, truth, axis=1)[:, :, None] < k + np.arange(9)
    return found.sum(axis=1).mean(axis=0), found.all(axis=1).mean(axis=0)


@pytest.mark.parametrize(("k", "experts"), [(1, 16), (2, 16), (4, 32), (8, 64)])
@pytest.mark.parametrize("noise", [0.2, 0.6])
def test_hits_and_whole_choices_grow_as_recorded(k: int, experts: int, noise: float) -> None:
    hits, exact = _nested(k, experts, noise)
    start, gains = growth(k=k, hits=hits, exact=exact)
    assert start.sum() == pytest.approx(1) and (gains >= 0).all() and (gains <= 1).all()
    # an independent way: the chain as a matrix; near 1 a probability may be cut
    state = start
    for wider, gain in enumerate(gains, 1):
        step = np.diag(1 - gain) + np.diag(gain[:-1], 1)
        state = state @ step
        assert state @ np.arange(k + 1) == pytest.approx(hits[wider], abs=1e-4)
        assert state[k] == pytest.approx(exact[wider], abs=1e-4)
    assert start @ np.arange(k + 1) == pytest.approx(hits[0]) and start[k] == pytest.approx(exact[0])


@pytest.mark.parametrize(("distance", "form"), [(1, "router"), (2, "residual")])
@pytest.mark.parametrize("width", [2, 3, 5, 10])
def test_a_gate_foresees_as_often_as_the_run_recorded(
    sample: tuple[Workload, dict[tuple[int, str], Recorded]], distance: int, form: str, width: int
) -> None:
    work, everything = sample
    recorded = everything[distance, form]
    found = by_gate(work, train=work, recorded=recorded, ahead=distance, width=width)
    done = score(found, work)
    expected, whole = recorded.recall[:, width - 2], recorded.exact_share[:, width - 2]
    assert np.isnan(expected[:distance]).all() and (found.ids[:distance] == -1).all()
    assert (recorded.tokens.sum(axis=0)[distance:] == work.num_passes).all()
    later = slice(distance, None)
    error = 4 * np.sqrt(expected * (1 - expected) / work.num_passes)[later]
    assert (np.abs(done.per_layer() - expected)[later] <= error).all()
    exact = done.exact.sum(axis=0) / np.maximum(done.steps.sum(axis=0), 1)
    assert (np.abs(exact - whole)[later] <= 4 * np.sqrt(whole * (1 - whole) / work.num_passes)[later]).all()
    assert all(len(sets_of(one)) == width for one in found.ids[distance, :200])


def test_wider_predictions_begin_with_the_narrower_ones(
    sample: tuple[Workload, dict[tuple[int, str], Recorded]],
) -> None:
    work, everything = sample
    recorded = everything[1, "router"]
    wide = by_gate(work, train=work, recorded=recorded, width=6)
    np.testing.assert_array_equal(wide.first(3).ids, by_gate(work, train=work, recorded=recorded, width=3).ids)


def test_domains_have_their_own_recall(sample: tuple[Workload, dict[tuple[int, str], Recorded]]) -> None:
    work, everything = sample
    recorded = everything[1, "router"]
    for name in ("arithmetic", "japanese"):
        mine = work.of_domain(name)
        at = recorded.domains.index(name)
        expected = recorded.hits[at, 1:, 0].sum() / recorded.selections[at, 1:].sum()
        found = score(by_gate(mine, train=work, recorded=recorded), mine).recall
        assert found == pytest.approx(expected, abs=4 * np.sqrt(0.25 / recorded.selections[at, 1:].sum()))


def test_layers_that_choose_fewer_experts_have_their_own_figures() -> None:
    selections = np.argsort(np.random.default_rng(0).random((3, 10, 300, 9)), axis=-1)[..., :3]
    selections[1, ..., 2] = -1
    work = decode(selections=selections, num_experts=9, top_k=[3, 2, 3])
    tokens = np.array([[0, 1000, 1000]])
    curves = [np.stack([np.zeros(3), one, other])[None].astype(np.int64) for one, other in (
        ([1000, 1200, 1300], [2000, 2300, 2500]), ([300, 400, 450], [400, 550, 700]))]  # fmt: skip
    recorded = Recorded(1, ("all",), tokens, tokens * [3, 2, 3], *curves)
    for width, recall in ((3, [1200 / 2000, 2000 / 3000]), (4, [1300 / 2000, 2300 / 3000])):
        found = score(by_gate(work, train=work, recorded=recorded, width=width), work)
        np.testing.assert_allclose(found.per_layer()[1:], recall, atol=0.03)
    with pytest.raises(PlanError, match="recorded 3 to 4"):
        by_gate(work, train=work, recorded=recorded, width=5)


def test_batches_put_predictions_together() -> None:
    work = drawn_workload(4, experts=12, k=3, requests=6, length=30)
    foreseen = corrupted(work, train=work, accuracy=0.7)
    pairs = batched(work, size=3)
    found = together(foreseen, work, lambda single: batched(single, size=3))
    for layer in range(1, 3):
        for one in range(pairs.num_passes):
            members = [one % 30 + 30 * (3 * (one // 30) + at) for at in range(3)]
            votes = np.bincount(foreseen.ids[layer, members].ravel(), minlength=12)
            expected = [
                expert for expert in sorted(range(12), key=lambda expert: (-votes[expert], expert)) if votes[expert]
            ]
            assert [expert for expert in found.ids[layer, one] if expert >= 0] == expected
    assert score(found, pairs).recall > score(foreseen, work).recall


def test_gates_that_nobody_recorded_are_refused(
    sample: tuple[Workload, dict[tuple[int, str], Recorded]],
) -> None:
    work, everything = sample
    recorded = everything[1, "router"]
    for given, message in (
        ({"ahead": 2}, "at distance 1"),
        ({"width": 1}, "recorded 2 to 10"),
        ({"width": 11}, "recorded 2 to 10"),
        ({"across_passes": True}, "across passes"),
    ):
        with pytest.raises(PlanError, match=message):
            by_gate(work, train=work, recorded=recorded, **given)
    pairs = batched(work, size=2)
    with pytest.raises(PlanError, match="single tokens"):
        find("cross_layer_gate").predict(pairs, train=work, recorded=recorded)
    with store.open_run(SAMPLE) as run, pytest.raises(PlanError, match="residual at distance 1"):
        recall_of(run, distance=7)
