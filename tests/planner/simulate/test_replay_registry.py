"""The registry of policies against their functions and the plan's words."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from compressor.plan.caching import CachePolicy
from planner.simulate.policies import POLICIES, policy
from planner.simulate.replay import residency
from planner.simulate.workload import decode


def test_names_are_unique_and_hold_every_policy_of_a_plan() -> None:
    names = [one.name for one in POLICIES]
    assert len(set(names)) == len(names) and set(get_args(CachePolicy)) <= set(names)
    assert policy("lru") is POLICIES[names.index("lru")]


@pytest.mark.parametrize("one", POLICIES, ids=lambda one: one.name)
def test_each_has_a_documented_function(one: object) -> None:
    function = one.function  # type: ignore[attr-defined]
    signature = inspect.signature(function)
    assert next(iter(signature.parameters)) == "job" and function.__doc__
    assert all(each.kind is each.KEYWORD_ONLY for each in list(signature.parameters.values())[1:])


@pytest.mark.parametrize("one", POLICIES, ids=lambda one: one.name)
def test_what_is_evicted_depends_on_the_future_for_bounds_alone(one: object) -> None:
    """Expert 2 needs room; whether 0 or 1 is wanted next is known to those alone that see ahead."""
    found = set()
    for then in (0, 1):
        work = decode(selections=np.array([0, 1, 0, 1, 2, then, 1 - then])[None, None, :, None], num_experts=3)
        train = decode(selections=np.array([0, 1, 0, 1, 2])[None, None, :, None], num_experts=3)
        there = residency(work, policy=one.name, slots=2, train=train, passes=range(5, 6))  # type: ignore[attr-defined]
        found.add(bool(there.all()))
    assert (found == {True}) == (one.bound or one.name == "static")  # type: ignore[attr-defined]


def test_importing_a_policy_does_not_load_numba() -> None:
    code = (
        "import sys, planner.simulate.replay, planner.simulate.policies as p; [one.function for one in p.POLICIES];"
        "assert 'numba' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
