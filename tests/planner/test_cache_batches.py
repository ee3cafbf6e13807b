"""Sequences put together and bit planes, on the bundled run: what any order must keep, and what the best must reach."""

from __future__ import annotations

from pathlib import Path

import pytest

import store
from planner.cache.batches import batches
from planner.cache.bit_planes import bit_planes
from planner.cache.foreseen import foreseen
from planner.cache.outlook import outlook
from planner.cache.policies import RULES, compare
from planner.cache.setting import Setting, setting_of
from planner.machines import machine
from planner.simulate.curves import curve
from planner.simulate.replay import replay

SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"


@pytest.fixture(scope="module")
def setting() -> Setting:
    with store.open_run(SAMPLE) as run:
        return setting_of(run, machine("rtx3060", vram=7 * 2**20), context=512, steps=12_000)


def test_the_same_tokens_need_fewer_experts_when_they_are_put_together_by_them(setting: Setting) -> None:
    rows = batches(setting, slots=setting.slots, size=4)
    arrival, pairs, regrouped, swapped, *_ = rows
    assert regrouped.unique <= pairs.unique
    assert swapped.unique <= regrouped.unique
    top_k = setting.source.layers[0].top_k
    assert all(top_k / 4 <= row.unique <= top_k for row in rows)  # k experts read by each token alone, or by all four
    assert all(row.loads_per_token == pytest.approx(row.unique * 6 * (1 - row.hit_rate) * setting.slot_bytes, rel=1e-9)
               for row in rows)  # fmt: skip
    assert arrival.title == "in order of arrival"


def test_orders_of_planes_lie_between_the_best_and_the_bound(setting: Setting) -> None:
    rows = {row.order: row for row in bit_planes(setting)}
    best = rows["the best there is"]
    assert best.ms <= rows["the plane that most tokens use first"].ms <= 2 * best.least
    assert best.ms <= rows["by number"].ms
    for row in rows.values():
        assert row.least <= row.ms
        assert 0 <= row.idle < row.ms


def test_policies_stand_beside_each_other(setting: Setting) -> None:
    slots = 6 * 5
    rows = compare(setting, slots=slots)
    assert len(rows) == len(RULES) == len({row.title for row in rows})
    known = [row.bound for row in rows]
    assert known == sorted(known)  # those that know the future stand at the end
    lru = next(row for row in rows if row.title == "Least recently used")
    assert lru.hit_rate == pytest.approx(curve(setting.test, policy="lru").rates()[4], abs=1e-12)
    best = next(row for row in rows if row.title == "Best possible with sets")
    per_layer = [row for row in rows if "one cache for all layers" not in row.title and row.title != "Fate"]
    assert all(row.hit_rate <= best.hit_rate + 1e-12 for row in per_layer)
    for row in rows:
        assert row.low <= row.hit_rate <= row.high
        assert row.ms > 0


def test_ways_to_foresee_stand_beside_each_other(setting: Setting) -> None:
    with store.open_run(SAMPLE) as run:
        rows = {row.title: row for row in foreseen(run, setting, slots=30)}
    known = rows["Routes of a given accuracy: 100%"]
    assert known.recall == known.precision == known.exact == known.recall_of_missing == 1.0
    assert known.wasted_per_token == pytest.approx(0.0)
    assert known.ms == min(row.ms for row in rows.values())
    assert rows["Routes of a given accuracy: 90%"].recall == pytest.approx(0.9, abs=0.01)
    assert "Frequencies by token id" in rows  # the bundled run keeps its text
    lru = replay(setting.test, policy="lru", slots=5)
    for row in rows.values():
        assert row.chance == pytest.approx(2 / 16, rel=0.01)
        assert row.precision == pytest.approx(row.recall, rel=0.02)  # as many are foreseen as are needed, or a few less
        assert row.loads_per_token >= (1 - lru.hit_rate) * 12 * setting.slot_bytes * 0.98  # prefetching saves no loads


def test_forecasts_are_held_against_what_came(setting: Setting) -> None:
    rows = outlook(setting, slots=30)
    assert [(row.policy, row.text) for row in rows] == [
        (policy, text) for policy in ("LRU caches", "the most used experts")
        for text in ("later requests", "an unseen domain")
    ]  # fmt: skip
    assert all(0 <= row.low <= row.rate <= row.high <= 1 for row in rows)
    later = rows[0]
    assert later.came == pytest.approx(replay(setting.test, policy="lru", slots=5).hit_rate, abs=1e-12)
    assert later.low <= later.came <= later.high
    assert rows[1].high - rows[1].low > later.high - later.low  # domains differ more than requests
    two = setting.on(*(one.of_domain("c", "german") for one in (setting.train, setting.test)))
    assert "an unseen domain" not in {row.text for row in outlook(two, slots=30)}
