"""Neurons that stay, in each form, against an independent ranking."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

import planner
import planner.importance as importance
import store
from compressor.plan import Plan, Protected
from compressor.plan.result import neurons_after, widths_after
from moescope.errors import PlanError
from planner.drop.depth import depth_probe
from planner.guard import Guard
from planner.slim import camera_p, forms, heapr, width
from tests.planner.collected import collected, task
from tests.profiler.capture.tiny import build

Array = NDArray[np.float64]
EXPERTS, WIDTH, SHARED = 8, 32, 40
PRESETS = {"camera_p": ("camera", camera_p), "heapr": ("heapr", heapr), "width": ("width", width)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    """Four layers of eight experts of 32 neurons, with a shared expert of 40."""
    with collected(build("qwen2_moe"), tmp_path_factory.mktemp("qwen2_moe")) as opened:
        yield opened


def _scores(run: store.Run, preset: str, domain: str | None = None) -> dict[int, tuple[Array, Array]]:
    frame = importance.score(run, PRESETS[preset][0], domain=domain).sort("layer", "expert", "neuron")
    found = {}
    for layer in range(4):
        routed = frame.filter(layer=layer, kind="routed")["value"].to_numpy().reshape(EXPERTS, WIDTH)
        found[layer] = routed, frame.filter(layer=layer, kind="shared")["value"].to_numpy()
    return found


def _masks(plan: Plan, layer: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    masks = neurons_after(plan)
    routed = [masks.get((layer, 0, expert, "routed"), np.ones(WIDTH, bool)) for expert in range(EXPERTS)]
    return np.array(routed), masks.get((layer, 0, 0, "shared"), np.ones(SHARED, bool))


def test_camera_ranks_all_neurons_of_a_layer_together(run: store.Run) -> None:
    plan = planner.make(run, preset="camera_p", share=0.3)
    assert plan.steps[0].form == "masked"
    kept_sum = total = 0.0
    for layer, (routed, shared) in _scores(run, "camera_p").items():
        values = np.concatenate([routed.ravel(), shared])
        gone = int(0.3 * len(values))
        kept = np.concatenate([mask.ravel() for mask in _masks(plan, layer)])
        assert (~kept).sum() == gone
        assert set(np.flatnonzero(~kept)) == set(np.argsort(values)[:gone])
        kept_sum, total = kept_sum + values[kept].sum(), total + values.sum()
    assert plan.estimate.kept_mass == pytest.approx(kept_sum / total, rel=1e-5)


def test_heapr_ranks_all_neurons_of_the_model_together(run: store.Run) -> None:
    plan = planner.make(run, preset="heapr", share=0.4)
    values = np.concatenate([routed.ravel() for routed, _ in _scores(run, "heapr").values()])
    kept = np.concatenate([_masks(plan, layer)[0].ravel() for layer in range(4)])
    gone = int(0.4 * len(values))
    assert (~kept).sum() == gone and values[~kept].max() <= values[kept].min()
    assert all(_masks(plan, layer)[1].all() for layer in range(4))
    counts = [(~_masks(plan, layer)[0]).sum() for layer in range(4)]
    assert len(set(counts)) > 1  # ranked over the model: layers lose different numbers
    with pytest.raises(PlanError, match="weighting 'sum' is not known"):
        planner.make(run, preset="heapr", share=0.4, weighting="sum")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("share", "multiple", "kept"), [(0.25, 8, 24), (0.3, 1, 23), (0.3, 8, 24), (0.4, 8, 24), (0.5, 16, 16)]
)
def test_uniform_keeps_the_best_of_every_expert(
    run: store.Run, preset: str, share: float, multiple: int, kept: int
) -> None:
    plan = planner.make(run, preset=preset, share=share, multiple=multiple, form="uniform")
    assert plan.steps[0].width == kept and set(widths_after(plan).values()) == {kept}  # type: ignore[union-attr]
    for layer, (routed, _) in _scores(run, preset).items():
        masks, shared = _masks(plan, layer)
        assert shared.all()
        for mask, values in zip(masks, routed, strict=True):
            assert mask.sum() == kept and values[mask].min() >= values[~mask].max()


def test_what_uniformity_costs_is_told(run: store.Run) -> None:
    plan = planner.make(run, preset="width", share=0.25, form="uniform")
    free = []
    total = 0.0
    for routed, _ in _scores(run, "width").values():
        free.append(np.sort(routed.ravel())[EXPERTS * 8 :].sum())
        total += routed.sum()
    assert f"would keep {sum(free) / total:.3f}" in plan.evidence[0].notes[1]
    assert plan.estimate.kept_mass is not None and plan.estimate.kept_mass < sum(free) / total


@pytest.mark.parametrize(("preset", "options"), [("heapr", {}), ("width", {}), ("width", {"weigh": "equal"})])
def test_per_layer_widths_lose_least_of_all_widths(run: store.Run, preset: str, options: dict[str, Any]) -> None:
    plan = planner.make(run, preset=preset, share=0.25, multiple=4, form="per_layer", engine="transformers", **options)
    found = [_masks(plan, layer)[0].sum(1) for layer in range(4)]
    assert all(len(set(widths.tolist())) == 1 and widths[0] % 4 == 0 for widths in found)
    influence = depth_probe(run).group_by("layer").agg(pl.col("moe_influence").mean()).sort("layer")["moe_influence"]
    costs = []
    for layer, (routed, _) in _scores(run, preset).items():
        lost = np.concatenate([[0], np.sort(routed, axis=1).sum(0).cumsum()])[::4][:8]
        weight = influence[layer] if preset == "width" and not options else 1.0
        costs.append(lost if preset == "heapr" else weight * lost / routed.sum())
    every = [counts for counts in itertools.product(range(8), repeat=4) if sum(counts) == 8]
    best = min(sum(cost[count] for cost, count in zip(costs, counts, strict=True)) for counts in every)
    mine = [(WIDTH - int(widths[0])) // 4 for widths in found]
    assert sum(mine) == 8
    assert sum(cost[count] for cost, count in zip(costs, mine, strict=True)) == pytest.approx(best, rel=1e-9)


def test_many_widths_are_compared_in_steps(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "STEPS", 4)
    plan = planner.make(run, preset="width", share=0.25, form="per_layer", engine="transformers", multiple=1)
    assert {int(kept) % 8 for layer in range(4) for kept in _masks(plan, layer)[0].sum(1)} == {0}


@pytest.mark.parametrize("preset", PRESETS)
def test_evidence_is_the_sum_over_the_experts_neurons(run: store.Run, preset: str) -> None:
    plan = planner.make(run, preset=preset, share=0.25)
    for layer, values in zip(_scores(run, preset).values(), plan.evidence[0].layers, strict=True):
        np.testing.assert_allclose(values.values, layer[0].sum(1), rtol=1e-5)


def _guarded(run: store.Run, *units: tuple[int, int, str], **changes: Any) -> Any:
    protected = tuple(Protected(layer=layer, expert=one, role=role, reason="super") for layer, one, role in units)  # type: ignore[arg-type]
    return task(run, guard=Guard(protected=protected, active=True), **changes)


def test_protected_experts_keep_their_neurons(run: store.Run) -> None:
    asked = _guarded(run, (1, 3, "routed"), (2, 0, "shared"), share=0.5, form="masked")
    (step,) = camera_p.draft(asked).steps
    cut = {(layer.layer, one.role, one.expert) for layer in step.layers for one in layer.experts}  # type: ignore[union-attr]
    assert (1, "routed", 3) not in cut and (2, "shared", 0) not in cut and (1, "shared", 0) in cut
    every = [(layer, one, "routed") for layer in range(4) for one in range(6)]
    for module, where in ((camera_p, "layer 0"), (heapr, "the model")):
        with pytest.raises(PlanError, match=f"neurons of {where}, so that at most .* can go and not"):
            module.draft(_guarded(run, *every, share=0.6, form="masked"))
    with pytest.raises(PlanError, match="more neurons than the layers without super experts have"):
        width.draft(_guarded(run, *every, share=0.5, form="per_layer"))


def test_domains_kept_apart_count_alike(tmp_path_factory: pytest.TempPathFactory, run: store.Run) -> None:
    folder = tmp_path_factory.mktemp("split")
    with collected(build("qwen2_moe"), folder, vectors_per_domain=True) as split:
        plan = planner.make(split, preset="width", share=0.25)
        only = planner.make(split, preset="width", share=0.25, domains=["german"])
        parts = [_scores(split, "width", domain) for domain in ("code", "german")]
        for layer in range(4):
            united = sum(part[layer][0] / part[layer][0].sum() for part in parts)
            for mask, values, own in zip(_masks(plan, layer)[0], united, parts[1][layer][0], strict=True):  # type: ignore[arg-type]
                assert values[mask].min() >= values[~mask].max()
                assert own.shape == values.shape
            for mask, values in zip(_masks(only, layer)[0], parts[1][layer][0], strict=True):
                assert values[mask].min() >= values[~mask].max()
        assert not any("pooled over domains" in note for note in plan.evidence[0].notes)
        whole = planner.make(split, preset="heapr", share=0.25, mix="tokens")
        assert whole.steps == planner.make(run, preset="heapr", share=0.25).steps
    assert "pooled over domains" in planner.make(run, preset="width", share=0.25).evidence[0].notes[0]
