"""The study of the bundled run: figures that agree with each other, and the same after a file."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_settings import EXPERT, random_routes, slow_machine, sticky_routes, written_run

import planner
import store
from moescope.errors import PlanError
from planner.cache.setting import setting_of
from planner.cache.study import Study
from planner.caching import study
from planner.machines import machine
from planner.simulate.replay import replay

MIB = 2**20
STEPS = 60_000
SAMPLE = Path(__file__).parents[2] / "sample_data" / "runs" / "sample.duckdb"
ASKED: dict[str, Any] = {"context": 512, "steps": STEPS}


@pytest.fixture(scope="module")
def run() -> store.Run:
    return store.open_run(SAMPLE)


@pytest.fixture(scope="module")
def found(run: store.Run) -> Study:
    return study(run, machine("rtx3060", vram=9 * MIB), **ASKED)


def numbers(value: Any) -> list[float]:
    """All numbers in plain data."""
    if isinstance(value, dict):
        return [one for part in value.values() for one in numbers(part)]
    if isinstance(value, (list, tuple)):
        return [one for part in value for one in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


def agree(found: Study) -> None:
    """What must hold of any study."""
    assert all(math.isfinite(one) for one in numbers(found.content()))
    assert [way.ms for way in found.ways] == sorted(way.ms for way in found.ways)
    assert found.best is found.ways[0]
    assert len({way.name for way in found.ways}) == len({way.title for way in found.ways}) == len(found.ways)
    for way in found.ways:
        assert found.bound_ms <= way.ms * (1 + 1e-9), way.name
        assert way.low <= way.ms * (1 + 1e-9) and way.ms <= way.high * (1 + 1e-9), way.name
        assert 0 <= way.hit_rate <= 1 and 0 <= way.stalled <= 1
        assert sum(way.layer_slots) <= found.slots
        assert way.wasted_per_token <= way.loads_per_token
        if way.misses == "load":  # others have two processors
            assert found.resident_ms <= way.ms * (1 + 1e-9), way.name
        else:
            assert way.loads_per_token == 0
    assert [point.slots for point in found.points] == sorted({point.slots for point in found.points})
    for point in found.points:
        assert point.bound <= point.ms * (1 + 1e-9)
        assert point.bound <= min(point.plain, point.chance) * (1 + 1e-9)
        assert point.low <= point.ms * (1 + 1e-9) and point.ms <= point.high * (1 + 1e-9)
        assert point.bytes == round(point.slots * found.memory["slot"])
    at = next(point for point in found.points if point.slots == found.slots)
    assert at.bound == found.bound_ms
    traced = [way.ms for way in found.ways if way.needs_trace]
    assert at.ms == min(traced) and at.way == next(way.title for way in found.ways if way.needs_trace)
    assert at.plain == min(way.ms for way in found.ways if not way.needs_trace)
    assert sum(row.tokens for row in found.domains) == found.tokens
    assert [row.ms for row in found.domains] == sorted((row.ms for row in found.domains), reverse=True)
    for parts in found.parts.values():
        assert list(parts) == ["random", "popularity", "topic", "locality"]
        assert 0 <= sum(parts.values()) <= 1
    assert Study.of(json.loads(json.dumps(found.content()))) == found


def test_figures_agree(found: Study) -> None:
    agree(found)
    assert found.run == "sample"
    assert found.machine == ("rtx3060", "NVIDIA GeForce RTX 3060 12 GB")
    assert (found.layers, found.experts, found.all_slots) == (6, 16, 96)
    assert found.asked == ASKED
    names = [way.name for way in found.ways]
    assert "lru+cross_layer_gate" in names and "lru+transitions" in names
    assert found.points[-1].slots == 96
    assert found.points[-1].ms == pytest.approx(found.resident_ms, rel=1e-9)


def test_memory_adds_up(found: Study) -> None:
    memory = found.memory
    assert (
        memory["total"]
        == 9 * MIB
        == pytest.approx(memory["other"] + memory["kv"] + memory["activations"] + memory["experts"])
    )
    assert found.slots == int(memory["experts"] // memory["slot"])


def test_curves_are_in_order_and_explain_the_parts(found: Study) -> None:
    rates = {(one.policy, one.control, one.slots): one.rate for one in found.curves}
    policies = {one.policy for one in found.curves if one.control == "observed"}
    assert policies == {"lru", "lfu", "static", "min_set", "min_flat", "min_bypass"}
    for slots in range(2, 17):
        bypass, flat, whole = (rates[name, "observed", slots] for name in ("min_bypass", "min_flat", "min_set"))
        assert bypass >= flat >= whole >= max(rates["lru", "observed", slots], rates["lfu", "observed", slots])
    each = found.slots // found.layers
    for name in ("lru", "static"):
        parts = found.parts[name]
        assert sum(parts.values()) == pytest.approx(rates[name, "observed", each], rel=1e-12)
        assert parts["random"] == rates[name, "uniform_experts", each]
        assert parts["locality"] == pytest.approx(
            rates[name, "observed", each] - rates[name, "shuffled_within_requests", each], abs=1e-12
        )
    assert found.parts["static"]["locality"] == 0  # sets that lie still do not mind the order
    intervals = [one for one in found.curves if one.low is not None and one.high is not None]
    assert {one.policy for one in intervals} == {"lru", "static"}
    assert all(one.low <= one.rate <= one.high for one in intervals if one.rate < 1)  # type: ignore[operator]


def test_figures_are_those_of_a_replay(run: store.Run, found: Study) -> None:
    setting = setting_of(run, machine("rtx3060", vram=9 * MIB), **ASKED)
    assert found.tokens == setting.test.num_passes
    lru = next(way for way in found.ways if way.name == "lru")
    other = replay(setting.test, policy="lru", layer_slots=list(lru.layer_slots))
    assert lru.hit_rate == pytest.approx(other.hit_rate, rel=1e-12)
    assert lru.loads_per_token == pytest.approx(other.missing.sum() * 3 * 128 * 128 * 2 / found.tokens, rel=1e-9)
    assert lru.stalled == pytest.approx(other.stalled_share, rel=1e-12)


def test_the_same_every_time(run: store.Run, found: Study) -> None:
    again = study(run, machine("rtx3060", vram=9 * MIB), **ASKED)
    assert again == found
    other = study(run, machine("rtx3060", vram=9 * MIB), seed=1, **ASKED)
    assert [way.ms for way in other.ways] == [way.ms for way in found.ways]
    assert other.parts["lru"]["random"] != found.parts["lru"]["random"]


def test_other_files_are_no_studies(found: Study) -> None:
    content = json.loads(json.dumps(found.content()))
    for broken in (
        {}, [], {**content, "kind": "placement"}, {**content, "verdict": None}, {**content, "points": [1]},
        {**content, "ways": 3}, {name: value for name, value in content.items() if name != "srp"},
        {**content, "more": 1},
    ):  # fmt: skip
        with pytest.raises(PlanError, match="no study of caching") as refused:
            Study.of(broken)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)
    assert {one.name for one in fields(Study)} | {"kind"} == set(content)


def test_of_some_domains(run: store.Run) -> None:
    found = study(run, machine("rtx3060", vram=9 * MIB), domains=("c", "german"), **ASKED)
    agree(found)
    assert {row.domain for row in found.domains} == {"c", "german"}
    assert found.asked["domains"] == ["c", "german"]
    assert found.srp is None  # it is known of all text only
    assert not any("SRP" in text for text in found.verdict.reasons)


def test_of_sequences_decoded_together(run: store.Run) -> None:
    found = study(run, machine("rtx3060", vram=14 * MIB), batch=4, **ASKED)
    agree(found)
    assert {row.domain for row in found.domains} == set(run.domains)
    assert any(way.name == "lru+cross_layer_gate" for way in found.ways)
    alone = study(run, machine("rtx3060", vram=14 * MIB), **ASKED)
    assert found.best.ms < alone.best.ms


def test_narrower_experts_fit_in_larger_numbers(run: store.Run, found: Study) -> None:
    plan = planner.make(run, preset="uniform_bits", bits=4.5, form="packed")
    narrow = study(run, machine("rtx3060", vram=9 * MIB), plan=plan, **ASKED)
    assert narrow.verdict.word == "fits"
    small = study(run, machine("rtx3060", vram=6 * MIB), plan=plan, **ASKED)
    agree(small)
    assert found.slots < small.slots < 96


def test_devices_that_hold_less_than_one_step_of_every_layer(run: store.Run) -> None:
    small = study(run, machine("rtx3060", vram=5 * MIB), **ASKED)
    agree(small)
    assert small.slots < 12
    assert {way.policy for way in small.ways if way.name != "lru_shared"} == {"static"}
    assert any("forgets most of them" in text for text in small.verdict.reasons)


def test_layers_that_differ(tmp_path: Path) -> None:
    """In their numbers of experts, in those that a token chooses, and in experts without weights."""
    one, two = sticky_routes(0, stay=0.8, layers=2, experts=16, k=4, requests=12, length=40)
    one = np.where(one < 14, one, -1)
    three = np.concatenate(
        [random_routes(1, layers=1, experts=6, k=1, requests=12, length=40)[0], np.full((12, 40, 3), -1)], axis=-1
    )
    empty = [(layer, expert) for layer, expert in ((0, 14), (0, 15))]
    made = written_run(tmp_path, np.stack([one, two, three]), experts=[16, 16, 6], top_k=[4, 4, 1], empty=empty,
                       domains=list("ab" * 6), config={})  # fmt: skip
    given = slow_machine(link=1e9, cpu=3e8, vram=18 * EXPERT)
    found = study(made, given, other_weights=0)
    agree(found)
    assert found.all_slots == 14 + 16 + 6
    for way in found.ways:
        assert all(held <= most for held, most in zip(way.layer_slots, (14, 16, 6), strict=True)), way.name
    whole = study(made, replace(given, vram=36 * EXPERT), other_weights=0)
    assert whole.verdict.word == "fits"
    assert study(made, replace(given, vram=35 * EXPERT), other_weights=0).verdict.word != "fits"
    with pytest.raises(PlanError, match="one token needs 4 experts"):
        study(made, replace(given, vram=3 * EXPERT), other_weights=0)


def test_what_is_worked_out_is_told(run: store.Run) -> None:
    told: list[str] = []
    study(run, machine("rtx3060", vram=9 * MIB), tell=told.append, context=512, steps=6_000)
    assert len(told) == 4
    assert told[0] == "reading the trace"
