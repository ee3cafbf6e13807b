"""Sequences put together and bit planes, on the bundled run: what any order must keep, and what the best must reach."""

from __future__ import annotations

from pathlib import Path

import pytest

import store
from planner.cache.batches import batches
from planner.cache.bit_planes import bit_planes
from planner.cache.policies import RULES, compare
from planner.cache.setting import Setting, setting_of
from planner.machines import machine
from planner.simulate.curves import curve

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
