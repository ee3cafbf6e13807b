"""Curves of a whole trace, layer by layer, against those of the trace held at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cache_settings import random_routes, slow_machine, written_run

import store
from moescope import memory
from moescope.errors import PlanError
from planner.cache import whole
from planner.cache.setting import setting_of
from planner.cache.study import Study
from planner.cache.whole import whole_curves
from planner.caching import study

DOMAINS = ["code", "prose", "code", "math", "code", "prose", "math", "code"]
ASKED = {"other_weights": 0, "context": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    folder: Path = tmp_path_factory.mktemp("whole")
    ids = random_routes(5, layers=3, experts=6, k=2, requests=len(DOMAINS), length=40)
    for request in range(len(DOMAINS)):
        ids[:, request, 25 + request :] = -1
    ids[1, 2, 3] = -1  # a token without experts in one layer
    return written_run(folder, ids, domains=DOMAINS, experts=[8, 6, 8], empty=[(2, 7)], prompt=10)


def figures(found: Study) -> tuple:
    return found.curves, found.parts, found.ways, found.points, found.verdict


@pytest.mark.parametrize("asked", [{}, {"domains": ["code", "math"]}, {"phase": "decode"}])
def test_curves_are_those_of_the_trace_at_once(run: store.Run, asked: dict) -> None:
    at_once = study(run, slow_machine(), **ASKED, **asked)
    found = study(run, slow_machine(), whole=True, **ASKED, **asked)
    assert figures(found) == figures(at_once)
    assert found.asked["curves"] == "all tokens" and "Hit-rate curves" in found.notes[0]
    assert Study.of(found.content()) == found


def test_times_rest_on_steps_and_curves_on_all(run: store.Run) -> None:
    found = study(run, slow_machine(), whole=True, steps=200, **ASKED)
    every = study(run, slow_machine(), **ASKED)
    assert found.tokens < every.tokens and found.curves == every.curves
    assert f"{every.tokens:,} tokens of {every.requests:,} requests" in found.notes[0]
    assert f"rest on {3 * found.tokens:,} layer-steps" in found.notes[0]


def test_many_requests_are_told_apart_in_bundles(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = setting_of(run, slow_machine(), **ASKED)
    every = whole_curves(run, setting)
    monkeypatch.setattr(whole, "MOST_BUNDLES", 2)
    found = whole_curves(run, setting)
    assert len(every.domains) == every.requests == found.requests > len(found.domains) >= 2
    for control, curves in every.curves.items():
        for name, one in curves.items():
            np.testing.assert_array_equal(found.curves[control][name].rates(), one.rates())
    assert len(found.curves["observed"]["lru"].uses) == len(found.domains)


def test_what_cannot_be_is_refused(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="token by token: leave out --batch and --chunk"):
        study(run, slow_machine(), whole=True, batch=2, **ASKED)
    setting = setting_of(run, slow_machine(), **ASKED)
    monkeypatch.setattr(whole, "_SELECTION_BYTES", 10**9)
    with memory.limited(8 << 30), pytest.raises(PlanError, match="one layer of all .* give --memory-limit .*--steps N"):
        whole_curves(run, setting)


def test_a_memory_limit_cuts_what_times_rest_on(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    every = study(run, slow_machine(), whole=True, **ASKED)
    monkeypatch.setattr(memory, "share", lambda part, most: min(most, 120 * 2 * 200))
    found = study(run, slow_machine(), whole=True, **ASKED)
    assert found.tokens < every.tokens and found.curves == every.curves
