"""Preset mixed: who goes against every assignment there is, widths against HiGHS, bytes counted, guard and factors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

import planner
import store
from compressor.plan import BITS, PARTS, DropStep, Plan, Protected, QuantizeStep, bits_after, experts_after, stored_bits
from moescope.errors import PlanError
from planner.estimate.storage import expert_bytes
from planner.guard import Guard
from planner.quantize import joint, knapsack
from tests.planner.collected import collected, task
from tests.profiler.capture.tiny import build

Array = NDArray[np.float64]
LAYERS, EXPERTS, KEPT, HIDDEN, WIDTH, GROUP = 2, 4, 2, 64, 32, 32
MATRIX = HIDDEN * WIDTH
WHOLE = LAYERS * EXPERTS * 3 * MATRIX
WIDTHS = (2, 4)
EVEN = 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    """Two layers of four experts of 32 neurons, two per token; every token in the sample of errors."""
    model = build("olmoe", num_hidden_layers=LAYERS, num_experts=EXPERTS, intermediate_size=WIDTH)
    folder = tmp_path_factory.mktemp("joint")
    with collected(model, folder, level="activations,errors", errors_every=1) as opened:
        yield opened


def _streams(run: store.Run, even: float) -> tuple[Array, Array]:
    """(layers, experts) squared output as a part of the stream, and what the expert's going costs."""
    names = ("stream_square_sum", "stream_gate_sum", "norm_square_sum", "tokens")
    rows = run.table("expert_output").group_by("layer", "expert").agg(pl.col(names).sum())
    rows = rows.sort("layer", "expert")
    figures = (rows[name].to_numpy().reshape(LAYERS, EXPERTS).astype(float) for name in names)
    part, gate, norm, tokens = figures
    seen = tokens.sum(1, keepdims=True) / KEPT
    evened = [(1 - even) * one + even * one.mean(1, keepdims=True) for one in (part / seen, gate / seen)]
    median = np.median(norm / tokens, axis=1, keepdims=True)
    return evened[0], evened[0] + evened[1] * median


def _relative(run: store.Run, part: str) -> Array:
    """(layers, experts, widths) error of a width over the expert's own output."""
    rows = run.table("expert_error").filter(kind="routed")
    found, whole = np.zeros((LAYERS, EXPERTS, len(BITS))), np.zeros((LAYERS, EXPERTS))
    for layer, expert, errors in rows.filter(part=part).select("layer", "expert", "gated_error_square_sum").iter_rows():
        found[layer, expert] += errors
    whole_rows = rows.filter(part="all").select("layer", "expert", "gated_output_square_sum")
    for layer, expert, square in whole_rows.iter_rows():
        whole[layer, expert] += square
    columns = [BITS.index(width) for width in WIDTHS]
    relative: Array = (found / whole[..., None])[..., columns]
    return relative


SIZE = {0: 0.0, **{width: stored_bits(width, inputs=HIDDEN, group_size=GROUP) for width in WIDTHS}}


def _every_assignment(costs: Array, capacity: float) -> dict[tuple[tuple[int, ...], ...], float]:
    """Who goes -> least cost of all assignments of gone, 2 and 4 bits that fit and keep the k dearest of each layer."""
    stay = [set(np.argsort(-layer[:, 0])[:KEPT].tolist()) for layer in costs]
    sizes = np.array([0.0, *(3 * MATRIX * SIZE[width] for width in WIDTHS)])
    found: dict[tuple[tuple[int, ...], ...], float] = {}
    for choice in itertools.product(range(3), repeat=LAYERS * EXPERTS):
        if sizes[list(choice)].sum() > capacity:
            continue
        gone = tuple(tuple(np.flatnonzero(np.array(one) == 0)) for one in (choice[:EXPERTS], choice[EXPERTS:]))
        if any(kept & set(one) for kept, one in zip(stay, gone, strict=True)):
            continue
        cost = float(costs.reshape(-1, 3)[np.arange(len(choice)), list(choice)].sum())
        if cost < found.get(gone, math.inf):
            found[gone] = cost
    return found


def _gone(plan: Plan) -> tuple[tuple[int, ...], ...]:
    after = experts_after(plan)
    stays = [{one.lead for one in after[layer, 0]} for layer in range(LAYERS)]
    return tuple(tuple(one for one in range(EXPERTS) if one not in kept) for kept in stays)


def _step(plan: Plan) -> QuantizeStep:
    step = plan.steps[-1]
    assert isinstance(step, QuantizeStep)
    return step


@pytest.mark.parametrize("drop", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("bits", [2.3, 2.9, 3.6, 4.4])
def test_no_assignment_is_cheaper(run: store.Run, bits: float, drop: float) -> None:
    part, going = _streams(run, EVEN)
    narrower = part[..., None] * _relative(run, "all")
    costs = np.concatenate([drop * going[..., None], narrower], axis=-1)
    best = _every_assignment(costs, bits * WHOLE)
    plan = planner.make(run, preset="mixed", bits=bits, drop=drop, widths=WIDTHS, group_size=GROUP)
    assert best[_gone(plan)] == pytest.approx(min(best.values()), rel=1e-4)
    _widths_are_the_best(run, plan, bits, part)


def _widths_are_the_best(run: store.Run, plan: Plan, bits: float, part: Array) -> None:
    """Those of single matrices, of what stays, in the bits that all experts may take."""
    units = [(layer, one.lead, name) for layer in range(LAYERS) for one in experts_after(plan)[layer, 0]
             for name in PARTS]  # fmt: skip
    relative = {name: _relative(run, name) for name in PARTS}
    costs = np.array([part[layer, expert] * relative[name][layer, expert] for layer, expert, name in units])
    sizes = np.tile([round(MATRIX * SIZE[width]) for width in WIDTHS], (len(units), 1))
    best = knapsack.solve_milp(costs=costs, sizes=sizes, capacity=math.floor(bits * WHOLE))
    found = bits_after(plan)
    columns = [WIDTHS.index(found[layer, 0, expert, "routed"][0].of(name)) for layer, expert, name in units]  # type: ignore[arg-type]
    assert costs[np.arange(len(units)), columns].sum() == pytest.approx(best.cost, rel=1e-4)
    assert sizes[np.arange(len(units)), columns].sum() <= bits * WHOLE
    assert _step(plan).granularity == "matrix" and _step(plan).method == "mixed"


def test_something_goes_and_something_stays(run: store.Run) -> None:
    """The cases above are not all alike: the cheaper it is to go, the more go, and at most all but k."""
    counts = [sum(map(len, _gone(planner.make(run, preset="mixed", bits=2.9, drop=drop)))) for drop in (0, 0.05, 1e-6)]
    assert counts[0] == 0 < counts[1] <= counts[2] == LAYERS * (EXPERTS - KEPT)


@pytest.mark.parametrize("drop", [0.0, -1.0])
def test_without_dropping_it_is_error_bits(run: store.Run, drop: float) -> None:
    plan = planner.make(run, preset="mixed", bits=3.3, drop=drop)
    alone = planner.make(run, preset="error_bits", bits=3.3)
    assert len(plan.steps) == 1 and _step(plan).layers == _step(alone).layers
    assert any("No expert may go" in note for note in plan.evidence[0].notes)


@pytest.mark.parametrize("drop", [0.05, 1.0])
def test_bytes_are_met_and_not_missed(run: store.Run, drop: float) -> None:
    """Where a plan of that many bytes is known, nothing dearer is taken for as many."""
    for bits in (2.6, 3.1, 3.7):
        first = planner.make(run, preset="mixed", bits=bits, drop=drop)
        memory = expert_bytes(first, source_bits=32)
        assert memory <= bits * WHOLE / 8
        again = planner.make(run, preset="mixed", memory=memory, drop=drop)
        assert expert_bytes(again, source_bits=32) <= memory
        assert again.steps == first.steps
        beside = planner.make(run, preset="mixed", memory=memory + 999, other_weights=999, drop=drop)
        assert beside.steps == first.steps


def test_the_least_that_can_be_is_met(run: store.Run) -> None:
    """All but k go, the others have the narrowest width: the budget that is named as the least is enough."""
    least = KEPT / EXPERTS * stored_bits(2, inputs=HIDDEN, group_size=GROUP)
    plan = planner.make(run, preset="mixed", bits=least)
    assert expert_bytes(plan, source_bits=32) * 8 == least * WHOLE
    with pytest.raises(PlanError, match=rf"what has to stay takes at least {least:.4g}$"):
        planner.make(run, preset="mixed", bits=least * 0.999)


def test_super_experts_stay_at_the_widest(run: store.Run) -> None:
    of = task(run, form="packed", bits=2.6)
    free = joint.draft(of, drop=0.05).steps[0]
    assert isinstance(free, DropStep)
    layer, expert = free.layers[0].layer, free.layers[0].experts[0]
    guard = Guard(protected=(Protected(layer=layer, expert=expert, reason="test"),), active=True)
    steps = joint.draft(task(run, form="packed", bits=2.6, guard=guard), drop=0.05).steps
    assert all(
        expert not in one.experts
        for step in steps if isinstance(step, DropStep) for one in step.layers if one.layer == layer
    )  # fmt: skip
    last = steps[-1]
    assert isinstance(last, QuantizeStep)
    (own,) = [one for entry in last.layers if entry.layer == layer for one in entry.experts if one.expert == expert]
    assert {own.gate, own.up, own.down} == {8}


def test_factors_give_bits_to_the_layer_that_is_dear(run: store.Run) -> None:
    for preset in ("mixed", "error_bits"):
        means = []
        for factors in ((20.0, 0.05), (1.0, 1.0), (0.05, 20.0)):
            plan = planner.make(run, preset=preset, bits=3.2, factors=factors)
            found = {key: entry for key, (entry, _) in bits_after(plan).items()}
            means.append(sum(float(one.of(p)) for key, one in found.items() if key[0] == 0 for p in PARTS))  # type: ignore[arg-type]
        assert means[0] > means[1] > means[2], preset


def test_routers_of_groups_drop_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = build("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=0)
    with collected(model, tmp_path_factory.mktemp("groups"), level="activations") as run:
        assert {layer.groups for layer in planner.make(run, preset="mixed", bits=5.0).source.layers} == {2}
        plan = planner.make(run, preset="mixed", bits=5.0, drop=1e-6)
        assert [step.step for step in plan.steps] == ["quantize"]
        assert any("routers limit themselves to groups" in note for note in plan.evidence[0].notes)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    """Two layers of eight experts beside a shared one; no errors were measured."""
    model = build("qwen2_moe", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with collected(model, tmp_path_factory.mktemp("shared"), level="activations") as opened:
        yield opened


@pytest.mark.parametrize("bits", [4.5, 8.6, 12.0, 40.0])
def test_room_for_all_is_a_plan(shared: store.Run, bits: float) -> None:
    """Experts that may not go cost infinity in the choice, never in the plan."""
    plan = planner.make(shared, preset="mixed", bits=bits, shared_bits=4)
    assert Plan.parse(plan.text()) == plan
    values = [value for layer in plan.evidence[0].layers for value in layer.values]
    assert len(values) == 16 and all(value is not None and math.isfinite(value) for value in values)
    if bits > 8.6:
        routed = [entry for (*_, role), (entry, _) in bits_after(plan).items() if role == "routed"]
        assert len(plan.steps) == 1 and {one.of(part) for one in routed for part in PARTS} == {8}


def test_it_is_taken_alone(run: store.Run) -> None:
    with pytest.raises(PlanError, match="'mixed' decides itself which experts go: take it alone"):
        planner.make(run, preset="reap", share=0.25, bits=3.0, quantizer="mixed")
