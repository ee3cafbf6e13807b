"""Slots of a budget over layers, controls and the cliff of a shared cache."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from set_caches import random_workload

from moescope.errors import PlanError
from planner.simulate.bounds import bounds
from planner.simulate.cliff import cliff
from planner.simulate.controls import SHUFFLED_OVER_ALL, SHUFFLED_WITHIN, UNIFORM, controls, decompose
from planner.simulate.curves import curve, popularity
from planner.simulate.outcome import Curve
from planner.simulate.split import equal_split, fate_split, split, split_hits
from planner.simulate.workload import batched, decode


def random_curve(seed: int, layers: int, sizes: int, smallest: int, *, concave: bool = False) -> Curve:
    generator = np.random.default_rng(seed)
    gains = generator.integers(0, 4, (2, layers, sizes)).astype(float)
    if concave:
        gains = -np.sort(-gains, axis=2)
    hits = np.cumsum(gains, axis=2)
    hits[:, :, : smallest - 1] = np.nan
    return Curve("lru", hits[:, :, -1].astype(np.int64), hits)


def best_by_trying(found: Curve, slots: int, low: list[int], high: list[int]) -> tuple[float, tuple[int, ...]]:
    """Most hits; of those, the split that gives the last layers least."""
    tried = [one for one in product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))) if sum(one) == slots]
    hits = [float(split_hits(found, np.array(one)).sum()) for one in tried]
    return max(hits), min(
        (one for one, value in zip(tried, hits, strict=True) if value == max(hits)), key=lambda one: one[::-1]
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), smallest=st.integers(1, 2), concave=st.booleans(), data=st.data())
def test_split_equals_trying_all(seed: int, smallest: int, concave: bool, data: st.DataObject) -> None:
    found = random_curve(seed, 3, 5, smallest, concave=concave)
    low = data.draw(st.lists(st.integers(smallest, 3), min_size=3, max_size=3))
    high = data.draw(st.lists(st.integers(3, 5), min_size=3, max_size=3))
    slots = data.draw(st.integers(sum(low), sum(high)))
    result = split(found, slots=slots, floors=low, ceilings=high)
    hits, first = best_by_trying(found, slots, low, high)
    assert result.sum() == slots and (result >= low).all() and (result <= high).all()
    assert split_hits(found, result).sum() == hits
    assert tuple(result.tolist()) == first


def test_split_of_a_trace_beats_equal_and_shallow_first() -> None:
    work = random_workload(4, layers=4, sequences=10, tokens=40, experts=10, k=2, ragged=False)
    lru = curve(work, policy="lru")
    for slots in (8, 17, 26, 40):
        chosen = split(lru, slots=slots)
        shallow = fate_split(num_layers=4, num_experts=10, top_k=work.top_k, slots=slots)
        even = equal_split(num_layers=4, slots=slots)
        assert chosen.sum() == shallow.sum() == even.sum() == slots
        best = split_hits(lru, chosen).sum()
        assert best >= split_hits(lru, shallow).sum() and best >= split_hits(lru, even).sum()
    assert fate_split(num_layers=4, num_experts=10, top_k=(2,) * 4, slots=19).tolist() == [10, 5, 2, 2]
    np.testing.assert_array_equal(equal_split(num_layers=4, slots=18), [5, 5, 4, 4])


def test_split_of_fixed_sets_is_the_top_over_all_layers() -> None:
    work = random_workload(2, layers=3, sequences=6, tokens=30, experts=8)
    fixed, joint = popularity(work, work), popularity(work, work, shared=True)
    for slots in (0, 1, 7, 13):
        hits = split_hits(fixed, split(fixed, slots=slots)).sum()
        assert hits == (joint.hits[:, 0, slots - 1].sum() if slots else 0)


def test_split_refusals() -> None:
    found = random_curve(0, 2, 5, 2)
    with pytest.raises(PlanError, match="3 slots cannot be split over the layers: give 4 to 10"):
        split(found, slots=3)
    with pytest.raises(PlanError, match="floor 1 of layer 1 is below the 2 experts that one of its steps needs"):
        split(found, slots=6, floors=[2, 1])
    with pytest.raises(PlanError, match="layer 0 cannot have 2 to 6 slots: it has 5 experts"):
        split(found, slots=6, ceilings=[6, 5])
    with pytest.raises(PlanError, match="floors are 3 numbers; the curve has 2 layers"):
        split(found, slots=6, floors=[2, 2, 2])
    with pytest.raises(PlanError, match="nothing to split"):
        split(Curve("lru", found.uses[:, :1], found.hits[:, :1], shared=True), slots=6)
    with pytest.raises(PlanError, match="3 slots cannot be split over 2 layers of 8 experts: give 4 to 16"):
        fate_split(num_layers=2, num_experts=8, top_k=(2, 2), slots=3)


def test_controls_destroy_one_property_each() -> None:
    work = random_workload(7, layers=2, sequences=5, tokens=30, experts=9, k=3)
    found = controls(work, seed=1)
    within, over, uniform = found[SHUFFLED_WITHIN], found[SHUFFLED_OVER_ALL], found[UNIFORM]
    assert work.weights is not None and within.weights is not None and over.weights is not None

    def passes(one, low=0, high=None):  # type: ignore[no-untyped-def]
        rows = np.concatenate([one.ids[:, low:high], one.weights[:, low:high], one.tokens[:, low:high]], axis=2)
        return sorted(map(tuple, rows.transpose(1, 0, 2).reshape(rows.shape[1], -1).tolist()))

    assert passes(over) == passes(work) and not np.array_equal(over.ids, work.ids)
    for low, high in zip(work.offsets[:-1], work.offsets[1:], strict=True):
        assert passes(within, low, high) == passes(work, low, high)
    assert not np.array_equal(within.ids, work.ids)
    np.testing.assert_array_equal(uniform.ids >= 0, work.ids >= 0)
    for row in uniform.ids.reshape(-1, 3):
        used = row[row >= 0]
        assert len(set(used.tolist())) == len(used)
    again = controls(work, seed=1)
    assert all(np.array_equal(again[name].ids, found[name].ids) for name in found)
    assert not np.array_equal(controls(work, seed=2)[UNIFORM].ids, uniform.ids)


def test_decomposition_names_the_cause() -> None:
    generator = np.random.default_rng(0)
    experts, sequences, tokens = 24, 12, 120
    popular = np.array([[generator.choice(experts, 2, replace=False, p=_skew(experts)) for _ in range(tokens)]
                        for _ in range(sequences)])  # fmt: skip
    topical = np.array([[generator.choice(6, 2, replace=False) + 6 * (one % 4) for _ in range(tokens)]
                        for one in range(sequences)])  # fmt: skip
    runs = np.array([[generator.choice(experts, 2, replace=False)] * 10 for _ in range(sequences * tokens // 10)])
    local = runs.reshape(2, -1, 2)  # long requests: shuffled, hardly a run is left
    uniform = np.array([[generator.choice(experts, 2, replace=False) for _ in range(tokens)] for _ in range(sequences)])
    for cause, selections in (("popularity", popular), ("topic", topical), ("locality", local), (None, uniform)):
        work = decode(selections=selections[None], num_experts=experts)
        rates = {name: curve(one, policy="lru").rates()[7] for name, one in controls(work, seed=0).items()}
        observed = curve(work, policy="lru").rates()[7]
        parts = decompose(observed, rates)
        assert parts.random + parts.popularity + parts.topic + parts.locality == pytest.approx(observed, abs=1e-12)
        assert parts.random == pytest.approx(8 / experts, abs=0.05)
        if cause is None:
            assert abs(parts.gain) < 0.03
        else:
            assert parts.shares()[cause] > 0.8, cause
    with pytest.raises(PlanError, match="hit rates of control uniform_experts are missing"):
        decompose(0.5, {SHUFFLED_WITHIN: 0.4, SHUFFLED_OVER_ALL: 0.3})


def _skew(experts: int) -> np.ndarray:
    weights = 1.0 / np.arange(1, experts + 1) ** 1.5
    return weights / weights.sum()


def test_the_cliff_stands_at_one_cycle() -> None:
    # every token uses the experts of the token before with probability 0.9: all that a small shared cache misses
    generator = np.random.default_rng(3)
    layers, experts, k = 6, 16, 2
    ids = np.empty((layers, 1, 400, k), np.int64)
    for layer in range(layers):
        now = generator.choice(experts, k, replace=False)
        for token in range(400):
            if generator.random() > 0.9:
                now = generator.choice(experts, k, replace=False)
            ids[layer, 0, token] = now
    work = decode(selections=ids, num_experts=experts)
    joint, each = curve(work, policy="lru", shared=True), curve(work, policy="lru")
    found = cliff(work, shared=joint, per_layer=each)
    assert found.cycle == layers * k
    assert found.jump is not None and abs(found.jump - found.cycle) <= k
    assert found.before < 0.05 and found.after > 0.85
    assert found.slots[0] == layers * k and found.slots[-1] == layers * experts
    assert found.shared[-1] == found.per_layer[-1]
    start = found.sharing_pays_from
    if start is not None:
        at = int(np.flatnonzero(found.slots == start)[0])
        assert (found.shared[at:-1] >= found.per_layer[at:-1]).all()
        assert at == 0 or found.shared[at - 1] < found.per_layer[at - 1]
    best = bounds(work, names=["min_set"], shared=True)["min_set"].rates()
    assert best[found.cycle - k - 1] > 0.5  # the cliff is of LRU, not of sharing
    with pytest.raises(PlanError, match="a shared curve and one per layer"):
        cliff(work, shared=each, per_layer=joint)


def test_a_cycle_of_batches_is_their_median_union() -> None:
    work = batched(random_workload(2, layers=3, sequences=6, tokens=20, experts=12, k=2, ragged=False), size=3)
    found = cliff(work, shared=curve(work, policy="lru", shared=True), per_layer=curve(work, policy="lru"))
    assert found.cycle == int(np.median((work.ids >= 0).sum(axis=(0, 2))))
