"""Plans that factor: their groups, what they protect, what their factors would take, counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import planner
import store
from compressor.plan import FactorStep, MergeStep, Plan, Protected, experts_after
from moescope.errors import PlanError
from planner.estimate.storage import expert_bytes
from planner.factor import compeft, mc_smoe
from planner.factor.stored import factored_bytes
from planner.guard import Guard
from tests.planner.collected import collected, sample, task
from tests.profiler.capture.tiny import build

EXPERTS, WIDTH, HIDDEN, LAYERS = 16, 128, 128, 6
"""Of the bundled model."""


@pytest.fixture(scope="module")
def run() -> Iterator[store.Run]:
    with sample() as opened:
        yield opened


def _factors(plan: Plan) -> FactorStep:
    step = plan.steps[-1]
    assert isinstance(step, FactorStep)
    return step


def test_mc_smoe_factors_what_m_smoe_leaves(run: store.Run) -> None:
    plan = planner.make(run, preset="mc_smoe", share=0.5, rank=16)
    merge = planner.make(run, preset="m_smoe", share=0.5).steps[0]
    step, after = _factors(plan), experts_after(plan)
    assert _factors(planner.make(run, preset="mc_smoe", share=0.5)).rank == mc_smoe.RANK == 32
    assert isinstance(merge, MergeStep) and plan.steps[0] == merge and len(plan.steps) == 2
    assert (step.method, step.form, step.rank, step.density) == ("low_rank_sparse", "dense", 16, 0.1)
    for layer in step.layers:
        assert [group.members for group in layer.groups] == [(one.lead,) for one in after[layer.layer, 0]]
    assert plan.estimate.bytes_saved == planner.make(run, preset="m_smoe", share=0.5).estimate.bytes_saved


def test_the_rank_fits_small_matrices(tmp_path: Path) -> None:
    with collected(build("olmoe", num_hidden_layers=2, intermediate_size=24), tmp_path, level="routing") as run:
        assert _factors(planner.make(run, preset="mc_smoe", share=0.5)).rank == 6
        with pytest.raises(PlanError, match="rank 32 is outside 1..23"):
            planner.make(run, preset="mc_smoe", share=0.5, rank=32)


def test_bytes_of_thin_matrices_are_counted_by_hand(run: store.Run) -> None:
    plan = planner.make(run, preset="mc_smoe", share=0.5, rank=16, density=0.1)
    kept = round(0.1 * 128)  # of 128 rows of every matrix
    for bits in (16, 32):
        matrix = 16 * (WIDTH + HIDDEN) * bits + kept * (128 * bits + 32)
        assert factored_bytes(plan, source_bits=bits) == LAYERS * EXPERTS // 2 * 3 * matrix // 8
    assert any(f"{factored_bytes(plan, source_bits=16):,} of" in note for note in plan.evidence[0].notes)


def test_bytes_of_residuals_are_counted_by_hand(run: store.Run) -> None:
    plan = planner.make(run, preset="compeft", share=0.75)
    bits = 0.0
    for layer in _factors(plan).layers:
        for group in layer.groups:
            bits += 3 * WIDTH * HIDDEN * 32
            if len(group.members) > 1:
                bits += len(group.members) * 3 * (WIDTH * HIDDEN * 1.6 + 16)
    assert factored_bytes(plan, source_bits=32) == round(bits / 8)
    assert plan.estimate.bytes_saved == 0 and plan.estimate.expert_parameters_after == plan.estimate.expert_parameters
    assert expert_bytes(plan, source_bits=32) == LAYERS * EXPERTS * 3 * WIDTH * HIDDEN * 4


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_the_least_squares_scale_is_that_of_drawn_numbers(run: store.Run, density: float) -> None:
    drawn = np.sort(np.abs(np.random.default_rng(0).normal(size=500_000)))[::-1]
    kept = drawn[: round(density * len(drawn))]
    found = compeft.least_squares_scale(density)
    assert found == pytest.approx(kept.mean(), rel=5e-3)  # the mean has the least squared error
    plan = planner.make(run, preset="compeft", share=0.5, density=density, scale=None)
    assert _factors(plan).scale == found


@pytest.mark.parametrize("share", [0.25, 0.75, 0.9375])
def test_centres_are_counted_by_the_share(run: store.Run, share: float) -> None:
    plan = planner.make(run, preset="compeft", share=share)
    for layer in _factors(plan).layers:
        assert len(layer.groups) == EXPERTS - EXPERTS * share  # one centre is enough, whatever k
        assert sorted(member for group in layer.groups for member in group.members) == list(range(EXPERTS))
        assert all(sum(group.weights) == pytest.approx(1) for group in layer.groups)


def test_members_put_out_alike(run: store.Run) -> None:
    """The first pair to share a centre is the most similar one of its layer, by all pairs."""
    plan = planner.make(run, preset="compeft", share=1 / EXPERTS)
    rows = run.table("expert_similarity").sort("layer", "expert")
    for layer in _factors(plan).layers:
        own = rows.filter((rows["layer"] == layer.layer) & (rows["kind"] == "routed") if "kind" in rows.columns
                          else rows["layer"] == layer.layer)  # fmt: skip
        gram = np.zeros((EXPERTS, EXPERTS))
        for expert, values in zip(own["expert"], own["product_sum"], strict=True):
            gram[expert] += np.array(values)[:EXPERTS]
        pairs = [
            (2 * gram[one, two] / (gram[one, one] + gram[two, two]), one, two)
            for one in range(EXPERTS)
            for two in range(one + 1, EXPERTS)
        ]
        (group,) = [group.members for group in layer.groups if len(group.members) > 1]
        assert group == max(pairs)[1:]


def test_protected_experts_are_not_factored(run: store.Run) -> None:
    guard = Guard(protected=(Protected(layer=2, expert=5, reason="test"),), active=True)
    low = mc_smoe.draft(task(run, guard=guard, share=0.5)).steps[-1]
    shared = compeft.draft(task(run, guard=guard, share=0.5, form="dense")).steps[-1]
    assert isinstance(low, FactorStep) and isinstance(shared, FactorStep)
    leads = {layer.layer: {group.lead for group in layer.groups} for layer in low.layers}
    assert 5 not in leads[2] and len(leads[2]) == EXPERTS // 2 - 1 and len(leads[3]) == EXPERTS // 2
    (layer,) = [layer for layer in shared.layers if layer.layer == 2]
    assert [group.members for group in layer.groups if 5 in group.members] == [(5,)]


@pytest.mark.parametrize(
    ("preset", "asked", "reason"),
    [
        ("mc_smoe", {"rank": 128}, "rank 128 is outside 1..127"),
        ("mc_smoe", {"density": 1.0}, "density 1 is outside"),
        ("compeft", {"density": -0.1}, "density -0.1 is outside"),
        ("compeft", {"scale": 0.0}, "scale 0 is not above 0"),
        ("compeft", {"form": "uniform"}, "has no form 'uniform': it has dense"),
        ("compeft", {"share": None, "memory": 10_000_000}, "rebuilt, which saves no memory: give a share"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(run: store.Run, preset: str, asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        planner.make(run, preset=preset, **{"share": 0.5, **asked})
