"""Presets that quantize: budgets, widths against programmes and rankings written anew from the run's tables, guard."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

import planner
import profiler
import store
from compressor.plan import BITS, PARTS, Plan, QuantizeStep, bits_after, experts_after, stored_bits, widths_after
from moescope.errors import PlanError
from planner.drop.depth import depth_probe
from planner.estimate.storage import mean_bits
from planner.guard import Guard
from planner.presets import DEFAULT_QUANTIZER, PRESETS
from planner.quantize import error_bits, knapsack, nested
from planner.quantize.errors import TYPICAL, layer_errors
from tests.planner.collected import collected, task
from tests.profiler.capture.tiny import build
from tests.profiler.planted import PLANTED, counting_batches, planted_model

Array = NDArray[np.float64]
LAYERS, EXPERTS, HIDDEN, WIDTH, SHARED, GROUP = 4, 8, 64, 32, 64, 32
WEIGHTS = 3 * HIDDEN * WIDTH
NAMES = [
    "error_bits", "pmq", "pmq_code", "frequency_bits", "first_blocks", "outlier_bits", "block_importance",
    "camera_bits", "edgemoe", "ternary", "nested", "uniform_bits", "random_bits",
]  # fmt: skip
GRANULAR = ["error_bits", "frequency_bits", "first_blocks", "outlier_bits", "block_importance", "camera_bits",
            "edgemoe", "random_bits"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    """Four layers of eight experts of 32 neurons, two per token, with a shared expert of 64: errors of every use."""
    model = build("qwen2_moe", shared_expert_intermediate_size=SHARED)
    folder = tmp_path_factory.mktemp("errors")
    with collected(model, folder, level="activations,errors", errors_every=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    """Twelve layers with three super experts, and no errors."""
    model, folder = planted_model(), tmp_path_factory.mktemp("planted")
    with profiler.watch(model, store=folder, name="planted", level="activations") as session, torch.no_grad():
        for batch in counting_batches(1):
            session.label(domains=batch.domains)
            model(input_ids=torch.as_tensor(batch.input_ids), attention_mask=torch.as_tensor(batch.attention_mask))
    assert session.path is not None
    with store.open_run(session.path) as opened:
        yield opened


def _stored(plan: Plan) -> float:
    """Effective bits of all experts, as form packed would store them."""
    steps = [one.model_copy(update={"form": "packed"}) if isinstance(one, QuantizeStep) else one for one in plan.steps]
    return mean_bits(plan.model_copy(update={"steps": tuple(steps)}), source_bits=32.0)


def _widths(plan: Plan, part: str = "up") -> dict[tuple[int, int], Any]:
    """(layer, routed expert) -> width."""
    return {(key[0], key[2]): bits.of(part) for key, (bits, _) in bits_after(plan).items() if key[3] == "routed"}


def _errors(run: store.Run, part: str = "all", column: str = "gated_error_square_sum") -> Array:
    """(layers, experts, widths) squared errors over the squared norm of all experts of the layer."""
    rows = run.table("expert_error").filter((pl.col("kind") == "routed") & (pl.col("part") == part))
    count = len(BITS) if column.startswith("gated") else 3
    found, whole = np.zeros((LAYERS, EXPERTS, count)), np.zeros(LAYERS)
    for layer, expert, errors in rows.select("layer", "expert", column).iter_rows():
        found[layer, expert] += errors
    for layer, energy in rows.select("layer", "gated_output_square_sum").iter_rows():
        whole[layer] += energy
    return found / whole[:, None, None]


def _influence(run: store.Run) -> Array:
    means = depth_probe(run).group_by("layer").agg(pl.col("moe_influence").mean()).sort("layer")
    return means["moe_influence"].to_numpy()


def _size(bits: Any, *, nested_from: int | None = None, weights: int = WEIGHTS) -> float:
    return weights * stored_bits(bits, inputs=HIDDEN, group_size=GROUP, nested=nested_from)


SHARED_WEIGHTS = 3 * HIDDEN * SHARED
WHOLE = LAYERS * (EXPERTS * WEIGHTS + SHARED_WEIGHTS)
ROOM = {bits: bits * WHOLE - LAYERS * _size(8, weights=SHARED_WEIGHTS) for bits in (4.0, 4.5, 5.0)}


def test_every_preset_is_here() -> None:
    assert set(NAMES) == {one.name for one in PRESETS if one.step == "quantize"} - {"mixed", "eaquant"}


@pytest.mark.parametrize("bits", [4.0, 5.0, 8.3])
@pytest.mark.parametrize("name", NAMES)
def test_budgets_are_met(run: store.Run, name: str, bits: float) -> None:
    shared = {"shared_bits": 3} if name == "ternary" else {}
    plan = planner.make(run, preset=name, bits=bits, **shared)
    (step,) = plan.steps
    assert isinstance(step, QuantizeStep) and step.group_size == GROUP and plan.target.bits == bits
    assert _stored(plan) <= bits
    found = bits_after(plan)
    assert len(found) == LAYERS * (EXPERTS + 1) and Plan.parse(plan.text()) == plan
    if name != "uniform_bits":
        shares = [entry.of(part) for key, (entry, _) in found.items() if key[3] == "shared" for part in PARTS]
        assert set(shares) == {{"nested": 4, "ternary": 3}.get(name, 8)}
    if step.form == "packed":
        assert plan.estimate.bits == pytest.approx(_stored(plan), rel=1e-5)
    assert planner.make(run, preset=name, bits=bits, **shared).text() == plan.text()


@pytest.mark.parametrize("granularity", ["layer", "projection"])
@pytest.mark.parametrize("name", GRANULAR)
def test_granularities_are_kept(run: store.Run, name: str, granularity: str) -> None:
    plan = planner.make(run, preset=name, bits=5.0, granularity=granularity)
    assert plan.steps[0].granularity == granularity and _stored(plan) <= 5.0  # type: ignore[union-attr]
    for layer in range(LAYERS):
        own = {part: {width for (at, _), width in _widths(plan, part).items() if at == layer} for part in PARTS}
        assert all(len(widths) == 1 for widths in own.values())
        if granularity == "layer":
            assert len(set.union(*own.values())) == 1


@pytest.mark.parametrize("bits", [4.0, 4.5])
@pytest.mark.parametrize("granularity", ["matrix", "expert", "layer", "projection"])
def test_error_bits_are_the_optimum_of_highs(run: store.Run, granularity: str, bits: float) -> None:
    widths = (2, 3, 4, 8)
    at = [BITS.index(width) for width in widths]
    weigh = _influence(run)[:, None, None]
    if granularity == "expert":
        costs, count = (_errors(run)[:, :, at] * weigh).reshape(-1, 4), 1.0
    elif granularity == "layer":
        costs, count = (_errors(run)[:, :, at] * weigh).sum(1), float(EXPERTS)
    elif granularity == "matrix":
        parts = [_errors(run, part)[:, :, at] * weigh for part in PARTS]
        costs, count = np.stack(parts, axis=2).reshape(-1, 4), 1 / 3
    else:
        parts = [_errors(run, part)[:, :, at] * weigh for part in PARTS]
        costs, count = np.stack([one.sum(1) for one in parts], axis=1).reshape(-1, 4), EXPERTS / 3
    sizes = np.tile([round(_size(width) * count) for width in widths], (len(costs), 1))
    best = knapsack.solve_milp(costs=costs, sizes=sizes, capacity=int(ROOM[bits]))
    plan = planner.make(run, preset="error_bits", bits=bits, granularity=granularity, weigh="influence")
    parts = PARTS if granularity in ("matrix", "projection") else ("up",)
    chosen = [[_widths(plan, part)[layer, 0 if count > 1 else expert] for part in parts]
              for layer in range(LAYERS) for expert in (range(1) if count > 1 else range(EXPERTS))]  # fmt: skip
    columns = np.array([widths.index(width) for row in chosen for width in row])
    assert costs[np.arange(len(costs)), columns].sum() == pytest.approx(best.cost, rel=1e-5)


def test_error_bits_layer_by_layer(run: store.Run) -> None:
    plan = planner.make(run, preset="error_bits", bits=4.5, budget="layer", granularity="expert")
    for layer in range(LAYERS):
        taken = sum(_size(width) for (at, _), width in _widths(plan).items() if at == layer)
        assert taken <= ROOM[4.5] / LAYERS < taken + _size(4) - _size(2)
    together = planner.make(run, preset="error_bits", bits=4.5, granularity="expert")
    assert Counter(_widths(plan).values()) != Counter(_widths(together).values())


@pytest.mark.parametrize(
    ("name", "options", "powers", "equal"),
    [
        ("pmq", {}, (1.0, 1.5, 2.0), True), ("pmq_code", {}, (1.0, 1.5, 1.0), False),
        ("pmq", {"alpha": 0, "beta": 0}, (0.0, 0.0, 2.0), True),
        ("pmq_code", {"shared_bits": 4}, (1.0, 1.5, 1.0), False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bits", [4.0, 3.6])
def test_pmq_solves_its_programme(
    run: store.Run, name: str, options: dict[str, Any], powers: tuple[float, ...], equal: bool, bits: float
) -> None:
    """phi and w from the table of loads, eps from that of errors; the programme by HiGHS."""
    load = run.table("expert_load").filter(pl.col("kind") == "routed").group_by("layer", "expert")
    load = load.agg(pl.col("tokens", "probability_sum").sum()).sort("layer", "expert")
    phi, share = (load[name].to_numpy().reshape(LAYERS, EXPERTS) for name in ("tokens", "probability_sum"))
    phi, share = phi / phi.sum(1, keepdims=True), share / share.sum(1, keepdims=True)
    eps = np.sqrt(_errors(run))[:, :, [BITS.index(width) for width in (1, 2, 3)]]
    costs = (phi ** powers[0] * share ** powers[1])[:, :, None] * eps ** powers[2]
    plan = planner.make(run, preset=name, bits=bits, **options)
    room = (bits * WHOLE - LAYERS * _size(options.get("shared_bits", 8), weights=SHARED_WEIGHTS)) / LAYERS
    found = re.search(r"(exactly|at most) ([\d.]+) per expert in every layer", " ".join(plan.evidence[0].notes))
    assert found is not None and (found[1] == "exactly") == equal
    nominal = round(float(found[2]) * EXPERTS)
    sizes, minimum = np.tile([1, 2, 3], (EXPERTS, 1)), np.array([0, 1, 1])
    for layer in range(LAYERS):
        own = [_widths(plan)[layer, expert] for expert in range(EXPERTS)]
        best = knapsack.solve_milp(costs=costs[layer], sizes=sizes, capacity=nominal, minimum=minimum, equal=equal)
        assert sum(costs[layer, expert, width - 1] for expert, width in enumerate(own)) == pytest.approx(best.cost)
        assert sum(own) == nominal if equal else sum(own) <= nominal
        assert 2 in own and 3 in own
        assert sum(_size(width) for width in own) <= room
    if nominal >= 3 * EXPERTS - 1:  # at least one has 2 bits
        return
    more: list[bool] = []  # of one nominal bit more, some layer's solution takes too many effective ones
    for layer in range(LAYERS):
        wider = knapsack.solve_milp(costs=costs[layer], sizes=sizes, capacity=nominal + 1, minimum=minimum, equal=equal)
        more.append(sum(_size(int(column) + 1) for column in wider.widths) > room)
    assert any(more)


def test_rankings_widen_the_highest(run: store.Run) -> None:
    tokens = run.table("expert_load").filter(pl.col("kind") == "routed").group_by("layer", "expert")
    uses = {(layer, expert): value for layer, expert, value in tokens.agg(pl.col("tokens").sum()).iter_rows()}
    grid = run.table("expert_grid").filter(pl.col("kind") == "routed").group_by("layer", "expert")
    outlier = {(layer, expert): value for layer, expert, value in grid.agg(pl.col("outlier").max()).iter_rows()}
    influence = dict(enumerate(_influence(run).tolist()))
    for name, values, more in (
        ("frequency_bits", uses, {}), ("outlier_bits", outlier, {}),
        ("first_blocks", {unit: -unit[0] for unit in uses}, {}),
        ("block_importance", {unit: influence[unit[0]] for unit in uses}, {}),
        ("frequency_bits", uses, {"widths": [3, 8]}),
    ):  # fmt: skip
        plan = planner.make(run, preset=name, bits=5.0, **more)  # type: ignore[arg-type]
        low, high = more.get("widths", [2, 4])
        widths = _widths(plan)
        assert set(widths.values()) == {low, high}
        wide, narrow = ([values[unit] for unit in widths if widths[unit] == one] for one in (high, low))
        assert min(wide) >= max(narrow)
        unit = EXPERTS if name in ("first_blocks", "block_importance") else 1
        taken = sum(_size(width) for width in widths.values())
        assert taken <= ROOM[5.0] < taken + unit * (_size(high) - _size(low))


def test_camera_ranks_experts_by_their_neurons_energy(run: store.Run) -> None:
    plan = planner.make(run, preset="camera_bits", bits=4.5, alpha=0.0)
    rows = run.table("neuron_activation").filter(pl.col("kind") == "routed")
    norms = run.table("expert_weight").filter(pl.col("kind") == "routed").sort("layer", "expert")
    down = np.array(norms["down_norm"].to_list()).reshape(LAYERS, EXPERTS, WIDTH)
    energy = np.zeros((LAYERS, EXPERTS))
    for layer, expert, squares in rows.select("layer", "expert", "gated_square_sum").iter_rows():
        energy[layer, expert] += np.array(squares) @ down[layer, expert] ** 2
    for layer in range(LAYERS):
        own = [_widths(plan)[layer, expert] for expert in np.argsort(-energy[layer]).tolist()]
        assert own == sorted(own, reverse=True)
        assert sum(map(_size, own)) <= ROOM[4.5] / LAYERS
    counts = Counter(_widths(plan).values())
    assert set(counts) == {2, 3, 4}
    most = planner.make(run, preset="camera_bits", bits=16.0)
    assert set(_widths(most).values()) == {4}


def test_edgemoe_lowers_the_least_sensitive_first(run: store.Run) -> None:
    """One expert after the other, by the error of its next width, until the budget is met."""
    widths = (2, 4, 8)
    costs = (_errors(run)[:, :, [BITS.index(one) for one in widths]] * _influence(run)[:, None, None]).reshape(-1, 3)
    columns = np.full(len(costs), 2)

    def lowest() -> int:
        following = [costs[unit, column - 1] if column else np.inf for unit, column in enumerate(columns.tolist())]
        return int(np.argmin(following))

    while sum(_size(widths[column]) for column in columns) > ROOM[4.5]:
        columns[lowest()] -= 1
    plan = planner.make(run, preset="edgemoe", bits=4.5)
    assert list(_widths(plan).values()) == [widths[column] for column in columns]
    error = float(costs[np.arange(len(costs)), columns].sum())
    assert f"is {error:.4g} by this choice" in " ".join(plan.evidence[0].notes)
    stopped = planner.make(run, preset="edgemoe", bits=8.0, tolerance=error * 1.0001)
    assert _widths(stopped) == _widths(plan)
    with pytest.raises(PlanError, match=r"lowering stops at a summed relative error of .* raise the tolerance"):
        planner.make(run, preset="edgemoe", bits=4.0, tolerance=error * 0.5)


def test_ternary_is_held_against_whole_experts(run: store.Run) -> None:
    plan = planner.make(run, preset="ternary", bits=8.5)
    assert set(_widths(plan).values()) == {"ternary"} and not any(key[3] == "shared" for key in bits_after(plan))
    routed, shared = _size("ternary"), 32 * SHARED_WEIGHTS
    assert _stored(plan) == pytest.approx((EXPERTS * routed + shared) / (EXPERTS * WEIGHTS + SHARED_WEIGHTS))
    assert int(EXPERTS * routed / (32 * WEIGHTS)) == 0
    assert "As many bytes hold 0 whole experts per layer (fewer than a token uses)" in " ".join(plan.evidence[0].notes)
    with pytest.raises(PlanError, match=r"5 bits per weight cannot be met: ternary experts .* take 8.0801"):
        planner.make(run, preset="ternary", bits=5.0)
    narrow = planner.make(run, preset="ternary", bits=5.0, shared_bits=4)
    assert _stored(narrow) <= 5.0


def test_nested_widths_have_nested_errors(run: store.Run) -> None:
    costs = (_errors(run, column="nested_error_square_sum") * _influence(run)[:, None, None]).reshape(-1, 3)
    sizes = np.tile([round(_size(width, nested_from=2)) for width in (2, 3, 4)], (len(costs), 1))
    shared = stored_bits(4, inputs=HIDDEN, group_size=GROUP, nested=2) * SHARED_WEIGHTS
    best = knapsack.solve_milp(costs=costs, sizes=sizes, capacity=int(4.0 * WHOLE - LAYERS * shared))
    plan = planner.make(run, preset="nested", bits=4.0)
    assert plan.steps[0].nested == 2  # type: ignore[union-attr]
    columns = np.array(list(_widths(plan).values())) - 2
    assert costs[np.arange(len(costs)), columns].sum() == pytest.approx(best.cost, rel=1e-5)


def test_controls(run: store.Run) -> None:
    for bits, width in ((2.6, 2), (4.0, 3), (4.99, 4), (8.75, 8)):
        plan = planner.make(run, preset="uniform_bits", bits=bits)
        assert {entry.of(part) for entry, _ in bits_after(plan).values() for part in PARTS} == {width}
    first, second = (planner.make(run, preset="random_bits", bits=4.5, seed=seed) for seed in (0, 1))
    assert _widths(first) != _widths(second)
    taken = sum(map(_size, _widths(first).values()))
    assert taken <= ROOM[4.5] < taken + _size(8) - _size(4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "outlier_bits"])
def test_super_experts_have_the_widest(planted: store.Run, name: str) -> None:
    plan = planner.make(planted, preset=name, bits=6.5)
    places = {(layer, expert) for layer, expert, _ in PLANTED}
    assert {(unit.layer, unit.expert) for unit in plan.evidence[0].protected} == places
    widths, found = _widths(plan), bits_after(plan)
    if name == "ternary":
        assert not places & set(widths) and len(widths) == sum(one.num_experts for one in plan.source.layers) - 3
        return
    order = [BITS.index(one) for one in {entry.up for entry, _ in found.values()}]  # type: ignore[arg-type]
    assert {BITS.index(widths[place]) for place in places} == {max(order)}
    if name not in ("uniform_bits", "first_blocks", "block_importance"):
        tight = _tightest(planted, name)
        assert {_widths(tight)[place] for place in places} == {max(_widths(tight).values())}
        if name not in ("pmq", "pmq_code", "nested"):  # whose costs keep them wide without
            loose = planner.make(planted, preset=name, bits=float(tight.target.bits or 0), guard=False)
            assert not loose.evidence[0].guard
            assert {_widths(loose)[place] for place in places} != {max(_widths(tight).values())}


def _tightest(run: store.Run, name: str) -> Plan:
    """The plan of the fewest bits that a preset can meet, which its refusal names."""
    with pytest.raises(PlanError, match="cannot be met") as refused:
        planner.make(run, preset=name, bits=1.0)
    held = "9 matrices" if name == "error_bits" else "3 experts"
    assert f"{held} with super experts at" in str(refused.value)
    least = float(str(refused.value).split()[-1])
    plan = planner.make(run, preset=name, bits=least)
    assert least - 0.1 < _stored(plan) <= least
    with pytest.raises(PlanError, match="cannot be met"):
        planner.make(run, preset=name, bits=least - 0.001)
    return plan


def test_guarded_layers_are_wide(planted: store.Run) -> None:
    for granularity in ("layer", "projection"):
        plan = planner.make(planted, preset="error_bits", bits=5.0, granularity=granularity)
        layers = {layer for layer, _, _ in PLANTED}
        assert {width for (layer, _), width in _widths(plan).items() if layer in layers} == {8}


MIXTURES: list[dict[str, Any]] = [
    {"preset": "reap", "share": 0.25, "bits": 4.5},
    {"preset": "reap", "share": 0.25, "bits": 4.5, "quantizer": "pmq_code"},
    {"preset": "budgeted_reap", "share": 0.25, "bits": 4.5},
    {"preset": "camera_p", "form": "uniform", "share": 0.25, "bits": 5.0},
    {"preset": "camera_p", "form": "masked", "share": 0.25, "bits": 5.0, "quantizer": "edgemoe"},
    {"preset": "m_smoe", "share": 0.25, "bits": 4.5, "quantizer": "camera_bits"},
    {"preset": "m_smoe", "share": 0.25, "bits": 4.5, "form": "shared"},
    {"preset": "block_influence", "share": 0.25, "bits": 4.5, "quantizer": "frequency_bits"},
    {"preset": "reap", "share": 0.25, "bits": 6.0, "quantizer": "nested"},
]


@pytest.mark.parametrize("asked", MIXTURES, ids=lambda one: "-".join(map(str, one.values())))
def test_what_a_cut_leaves_is_quantized(run: store.Run, asked: dict[str, Any]) -> None:
    plan = planner.make(run, **asked)
    assert plan.steps[-1].step == "quantize" and len(plan.steps) == 2
    assert _stored(plan) <= asked["bits"]
    left = {(key[0], one.lead) for key, experts in experts_after(plan).items() for one in experts}
    assert set(_widths(plan)) == left
    assert f"+{asked.get('quantizer', 'error_bits')}" in plan.target.preset
    if asked.get("form") == "uniform":
        widths = set(widths_after(plan).values())
        assert widths == {24} and plan.steps[-1].group_size == 0  # type: ignore[union-attr]


def test_merged_experts_have_their_members_errors(run: store.Run) -> None:
    merged = planner.make(run, preset="m_smoe", share=0.5)
    one = task(run, form="packed", bits=5.5, before=merged.steps)
    (step,) = error_bits.draft(one, weigh="influence", granularity="expert").steps
    plan = merged.model_copy(update={"steps": (*merged.steps, step)}).checked()
    errors, weigh = _errors(run)[:, :, [BITS.index(one) for one in (2, 3, 4, 8)]], _influence(run)
    units = [(key[0], one) for key, experts in experts_after(plan).items() for one in experts]
    costs = np.array([weigh[layer] * errors[layer, list(one.members)].sum(0) for layer, one in units])
    sizes = np.tile([round(_size(width)) for width in (2, 3, 4, 8)], (len(costs), 1))
    whole = len(units) * WEIGHTS + LAYERS * SHARED_WEIGHTS
    room = int(5.5 * whole - LAYERS * _size(8, weights=SHARED_WEIGHTS))
    best = knapsack.solve_milp(costs=costs, sizes=sizes, capacity=room)
    columns = [(2, 3, 4, 8).index(_widths(plan)[layer, one.lead]) for layer, one in units]
    assert costs[np.arange(len(costs)), columns].sum() == pytest.approx(best.cost, rel=1e-5)


def test_evidence_says_what_it_rests_on(run: store.Run, planted: store.Run) -> None:
    plan = planner.make(run, preset="error_bits", bits=4.5, weigh="influence")
    (evidence,) = plan.evidence
    expected = _errors(run)[:, :, BITS.index(2)] * _influence(run)[:, None]
    values = np.array([layer.values for layer in evidence.layers], dtype=float)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    tokens = run.table("expert_error").filter((pl.col("kind") == "routed") & (pl.col("part") == "all"))
    uses = tokens.group_by("layer", "expert").agg(pl.col("tokens").sum())
    even = uses.with_columns(even=pl.col("tokens").sum().over("layer") / EXPERTS)
    thin = int((even["tokens"] < 2 * even["even"]).sum()) + LAYERS * EXPERTS - len(even)
    notes = " ".join(evidence.notes)
    assert f"{thin} of {LAYERS * EXPERTS} experts have fewer than 2 times the tokens" in notes
    assert f"{_stored(plan):.4g} effective bits per weight" in notes and "GSM8K" not in notes
    few = planner.make(run, preset="error_bits", bits=3.0, shared_bits=2)
    assert "GSM8K" in " ".join(few.evidence[0].notes) and "published by others" in " ".join(few.evidence[0].notes)
    assert "the run has no level errors" in " ".join(
        planner.make(planted, preset="edgemoe", bits=5.0).evidence[0].notes
    )
    rows = planner.make(run, preset="error_bits", bits=4.5, group_size=16).evidence[0].notes
    assert "Errors were measured in groups of 32: in groups of 16 they differ." in rows


def test_typical_errors_stand_in(planted: store.Run) -> None:
    """Without measured errors, costs are energies times one error per width, and nested ones those of plain widths."""
    one = task(planted, form="packed", bits=4.0)
    errors = layer_errors(one)
    assert not any(layer.measured for layer in errors.values())
    for layer in errors.values():
        np.testing.assert_allclose(layer.errors["all"], layer.energy[:, None] * np.array(TYPICAL))
    told = nested.draft(replace(one, form="dense")).notes
    assert any("no errors of nested widths" in note for note in told)
    assert error_bits.draft(replace(one, guard=Guard(), bits=3.5)).steps


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"widths": [2, 5]}, "width 5 is not known: there are 1, ternary, 2, 3, 4, 8"),
    "truth": ({"widths": [True, 2]}, "width True is not known"),
    "no width": ({"widths": []}, "no width is left: name some of 1, ternary, 2, 3, 4, 8"),
    "granularity": (
        {"granularity": "head"},
        "granularity 'head' is not known: use matrix, expert, layer or projection",
    ),
    "parameter": ({"sharedbits": 4}, "has a parameter 'sharedbits': did you mean 'shared_bits'?"),
    "shared": ({"shared_bits": 5}, "width 5 is not known"),
    "group": ({"group_size": 48}, "groups of 48 do not divide rows of 32: use 32"),
    "no group": ({"group_size": -1}, "group size -1 is no number of channels"),
    "scales": ({"scales": "wide"}, "scales 'wide' are not known: use range or clipped"),
    "budget": ({"budget": "expert"}, "budget 'expert' is not known: use model or layer"),
    "weigh": ({"weigh": "size"}, "weigh 'size' is not known"),
    "packed": ({"widths": [1, 2]}, "form packed holds widths 2, 3, 4 and 8, not width 1: use form dense"),
    "packed shared": ({"shared_bits": "ternary"}, "not width ternary: use form dense"),
    "too few": ({"bits": 2.0}, r"widths 2, 3, 4, 8 in groups of 32 and shared experts at 8 bits take at least 3.8"),
    "layer budget": ({"bits": 2.0, "budget": "layer"}, "2 bits per weight cannot be met"),
    "no bits": ({"bits": 0}, "0 bits per weight cannot be"),
    "share": ({"share": 0.2}, "preset 'error_bits' removes nothing"),
    "tolerance": ({"preset": "edgemoe", "tolerance": 0}, "tolerance 0 allows nothing"),
    "score": ({"preset": "frequency_bits", "score": "size"}, "score 'size' is not known: use frequency, first_blocks"),
    "three": ({"preset": "frequency_bits", "widths": [2, 3, 4]}, "tells two widths apart, not 3"),
    "one": ({"preset": "camera_bits", "widths": [3]}, "give at least two widths"),
    "alpha": ({"preset": "camera_bits", "alpha": 2}, "alpha 2 is outside"),
    "nested width": ({"preset": "nested", "widths": [2, 8]}, "use 2, 3 and 4, not 8"),
    "nested shared": ({"preset": "nested", "shared_bits": 8}, "use 2, 3 and 4, not 8"),
    "nested part": ({"preset": "nested", "granularity": "projection"}, "use granularity expert or layer"),
    "nested packed": ({"preset": "nested", "form": "packed"}, "has no form 'packed'"),
    "pmq layer": ({"preset": "pmq", "granularity": "layer"}, "granularity expert, not 'layer'"),
    "pmq ternary": ({"preset": "pmq", "widths": ["ternary", 2]}, "PMQ counts whole bits"),
    "pmq packed": ({"preset": "pmq", "form": "packed"}, "not width 1: use form dense"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(run: store.Run, name: str) -> None:
    asked, sentence = REFUSED[name]
    with pytest.raises(PlanError, match=sentence) as raised:
        planner.make(run, **{"preset": "error_bits", "bits": 4.5, **asked})
    assert "\n" not in str(raised.value)


def test_bits_alone_are_met_by_the_quantizer(run: store.Run) -> None:
    assert planner.make(run, bits=4.5) == planner.make(run, bits=4.5, preset=DEFAULT_QUANTIZER)
    assert planner.make(run, bits=4.5, quantizer="edgemoe") == planner.make(run, bits=4.5, preset="edgemoe")
    assert planner.make(run, bits=4.5, share=0.25).steps[0].step == "drop"


EITHER = ("error_bits", "pmq", "pmq_code", "edgemoe", "ternary", "nested", "uniform_bits", "random_bits")


@pytest.fixture(scope="module")
def errors_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    folder = tmp_path_factory.mktemp("errors")
    with collected(build("olmoe", num_hidden_layers=2), folder, level="errors", errors_every=4) as opened:
        yield opened


@pytest.mark.parametrize("name", EITHER)
def test_errors_do_without_activations(errors_alone: store.Run, name: str) -> None:
    assert "activations" not in errors_alone.info.levels
    plan = planner.make(errors_alone, preset=name, bits=5.5)
    notes = " ".join(plan.evidence[0].notes)
    assert name in ("uniform_bits", "random_bits") or "Errors were measured on" in notes
    assert name not in ("error_bits", "edgemoe", "nested") or "Layers count alike" in notes


def test_levels_that_are_missing_are_named(errors_alone: store.Run, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'mixed' needs activations: collect it with --level activations$"):
        planner.make(errors_alone, preset="mixed", bits=5.5)
    with collected(build("olmoe", num_hidden_layers=2), tmp_path, level="routing") as bare:
        sentence = "'error_bits' needs activations or errors: collect it with --level activations,errors$"
        with pytest.raises(PlanError, match=sentence):
            planner.make(bare, preset="error_bits", bits=5.5)


def test_runs_without_what_a_preset_needs_are_refused(planted: store.Run) -> None:
    with pytest.raises(PlanError, match="preset 'outlier_bits' needs errors: collect it with --level errors"):
        planner.make(planted, preset="outlier_bits", bits=4.0)
