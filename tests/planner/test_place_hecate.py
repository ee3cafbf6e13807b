"""Replicas under attention: the limit by hand, and what a replay holds to."""

from __future__ import annotations

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place.hecate import hecate, hidden_replicas, lasting, materialised


def test_the_limit_is_what_attention_time_carries() -> None:
    asked = {"bandwidth": 10e9, "expert_bytes": 1_000_000, "layers": 3}
    # 1 ms at 10 GB/s carries 10 MB: 10 experts; 0.25 ms 2.5 of them
    assert hidden_replicas(attention=1e-3, free_slots=99, **asked).tolist() == [10, 10, 10]  # type: ignore[arg-type]
    assert hidden_replicas(attention=[1e-3, 2.5e-4, 0], free_slots=4, **asked).tolist() == [4, 2, 0]  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="give a bandwidth and bytes above 0"):
        hidden_replicas(attention=1e-3, bandwidth=0, expert_bytes=1, free_slots=1, layers=1)
    with pytest.raises(PlanError, match="attention takes -1 seconds"):
        hidden_replicas(attention=-1, bandwidth=1, expert_bytes=1, free_slots=1, layers=1)


@pytest.mark.parametrize("limit", [0, 1, 3, 9])
@pytest.mark.parametrize("seed", range(4))
def test_devices_keep_their_own_take_no_more_than_the_limit_and_never_do_worse(limit: int, seed: int) -> None:
    load = np.random.default_rng(seed).lognormal(0, 1, 12)
    home = np.arange(12) // 3
    holds = materialised(load=load, home=home, devices=4, limit=limit)
    assert holds.max() == 1 and (holds[home, np.arange(12)] == 1).all()
    assert (holds.sum(1) <= 3 + limit).all()
    after = holds @ (load / holds.sum(0))
    before = np.bincount(home, weights=load)
    assert after.sum() == pytest.approx(load.sum()) and after.max() <= before.max() * (1 + 1e-12)
    if limit == 9:
        assert after.max() == pytest.approx(after.mean(), rel=1e-9)  # everything everywhere


def test_one_busy_expert_is_shared_out() -> None:
    load = np.ones(8)
    load[0] = 100
    holds = materialised(load=load, home=np.arange(8) // 2, devices=4, limit=1)
    assert holds[:, 0].tolist() == [1, 1, 1, 1]


def test_each_pass_rests_on_the_passes_before_it() -> None:
    loads = np.ones((12, 1, 8))
    loads[:6, 0, 0], loads[6:, 0, 7] = 50, 50
    done = hecate(loads=loads, devices=4, limits=[1], window=2)
    assert done.copies[0, 0] == 0 and (done.load[0] == done.fixed[0]).all()  # nothing is known yet
    balance = done.per_pass()[:, 0]
    assert balance[1:6].min() > 0.9  # the busy expert is known
    assert balance[6] < 0.35  # another is busy, and nobody knows
    assert balance[8:].min() > 0.9  # two passes later it is
    assert done.load.sum() == loads.sum() and done.balancedness > done.balancedness_without
    assert done.bytes_copied(7) == done.copies.sum() * 7
    assert (done.copies <= 4).all()


def test_replicas_that_stay_leave_balance_alone_where_none_helps() -> None:
    even = np.ones((2, 8))
    placed = lasting(load=even, devices=4, limit=2)
    assert placed.slots == 16 and placed.idle_slots() == 16
    np.testing.assert_allclose(placed.load(even), 2.0)
    with pytest.raises(PlanError, match="keeps 2 of 8 experts cannot take 7 others"):
        lasting(load=even, devices=4, limit=7)
