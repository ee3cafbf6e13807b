"""The guard on a model whose super experts were put there, and on runs that cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import planner
import profiler
import store
from compressor.plan import experts_after
from compressor.plan.result import neurons_after
from moescope.errors import PlanError
from planner.guard import guard_of
from planner.presets import PRESETS
from profiler.metrics import super_experts
from tests.app import synthetic
from tests.planner.collected import sample
from tests.profiler.planted import PLANTED, counting_batches, planted_model

PLACES = {(layer, expert) for layer, expert, _ in PLANTED}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    model = planted_model()
    folder = tmp_path_factory.mktemp("planted")
    with (
        profiler.watch(model, store=folder, name="planted", level="activations") as session,
        torch.no_grad(),
    ):
        for batch in counting_batches(1):
            session.label(domains=batch.domains)
            model(input_ids=torch.as_tensor(batch.input_ids), attention_mask=torch.as_tensor(batch.attention_mask))
    assert session.path is not None
    with store.open_run(session.path) as opened:
        yield opened


@pytest.mark.parametrize("rule", [True, "paper", "code"])
def test_planted_super_experts_are_protected(run: store.Run, rule: bool | str) -> None:
    guard = guard_of(run, rule)  # type: ignore[arg-type]
    assert guard.active
    assert {(unit.layer, unit.expert) for unit in guard.protected} == PLACES
    assert all("super expert" in unit.reason and "threshold" in unit.reason for unit in guard.protected)


PROTECTING = [one for one in PRESETS if one.level in ("routing", "activations") and one.step != "quantize"]
"""Presets that cut; tests/planner/test_quantize_presets.py has those that quantize."""


@pytest.mark.parametrize("preset", PROTECTING, ids=lambda one: one.name)
def test_no_plan_cuts_them(run: store.Run, preset: planner.presets.Preset) -> None:
    """They are rarely used, for one token per sequence, so that scores by use would cut them first."""
    # Where layers are as wide as their widest expert, those of super experts give nothing, and half is too much.
    plan = planner.make(run, preset=preset.name, share=0.25 if preset.forms[0] == "per_layer" else 0.5)
    assert {(unit.layer, unit.expert) for unit in plan.evidence[0].protected} == PLACES and plan.evidence[0].guard
    after, masks = experts_after(plan), neurons_after(plan)
    for layer, expert in PLACES:
        own = [one for one in after[layer, 0] if one.lead == expert]
        assert len(own) == 1 and own[0].members == (expert,)
        mask = masks.get((layer, 0, expert, "routed"))
        assert mask is None or mask.all() or plan.steps[0].form == "uniform"


def test_without_the_guard_they_go(run: store.Run) -> None:
    plan = planner.make(run, preset="frequency", share=0.75, guard=False)
    after = experts_after(plan)
    assert any(expert not in {one.lead for one in after[layer, 0]} for layer, expert in PLACES)
    assert not plan.evidence[0].guard and not plan.evidence[0].protected
    assert plan.evidence[0].notes[-1] == "Super experts are not protected: the guard was switched off."


@pytest.mark.parametrize("form", ["masked", "uniform", "per_layer"])
def test_slimming_spares_them_where_the_form_can(run: store.Run, form: str) -> None:
    options: dict[str, Any] = {"form": form, "engine": "transformers", "multiple": 1}
    plan = planner.make(run, preset="width", share=0.5, **options)
    masks = neurons_after(plan)
    whole = {(layer, expert) for layer, expert in PLACES if (layer, 0, expert, "routed") not in masks}
    assert whole == (set() if form == "uniform" else PLACES)
    if form == "per_layer":
        assert not {layer for layer, *_ in masks} & {layer for layer, _ in PLACES}
        assert "Layers with a super expert keep all their neurons." in plan.evidence[0].notes
    if form == "uniform":
        assert "Super experts lose neurons too: form uniform can spare none." in plan.evidence[0].notes


def test_layers_of_super_experts_stay(run: store.Run) -> None:
    plan = planner.make(run, preset="block_influence", share=0.75)
    assert not {layer for layer, _ in PLACES} & set(plan.steps[0].decoder_layers)  # type: ignore[union-attr]
    with pytest.raises(PlanError, match="3 of 12 layers hold super experts, so that at most 9 can go and not 10"):
        planner.make(run, preset="block_influence", share=10 / 12)


def test_they_stay_where_only_k_experts_do(tmp_path: Path) -> None:
    with store.open_run(synthetic.finished(tmp_path, metrics=False)) as run:
        guard = guard_of(run, True)
        assert {(unit.layer, unit.expert) for unit in guard.protected} == {synthetic.SUPER_EXPERT}
        plan = planner.make(run, preset="frequency", share=0.875)
        assert synthetic.SUPER_EXPERT[1] in {one.lead for one in experts_after(plan)[synthetic.SUPER_EXPERT[0], 0]}


def test_a_small_model_without_massive_activations_has_none() -> None:
    with sample() as run:
        paper, code = guard_of(run, True), guard_of(run, "code")
    assert paper.active and not paper.protected
    assert any("no MoE layer do massive activations form" in note for note in paper.notes)
    assert len(code.protected) == 1 and "code's rule" in code.protected[0].reason


def test_maxima_and_peaks_from_rows() -> None:
    maxima = super_experts.maxima_by_layer(
        layer=[4, 4, 1, 4], expert=[0, 0, 2, 1], value=[1.0, 3.0, 2.0, np.nan], layers=[1, 4]
    )
    np.testing.assert_array_equal(maxima, [[np.nan, np.nan, 2.0], [3.0, np.nan, np.nan]])
    assert super_experts.maxima_by_layer(layer=[], expert=[], value=[], layers=[1]).shape == (1, 0)
    peaks = super_experts.residual_peaks(layer=[1, 0, 1], absolute_max=[5.0, 2.0, 9.0], median_there=[0.1, 0.2, 0.3])
    assert peaks["layers"] == [0, 1]
    assert peaks["residual_max"].tolist() == [2.0, 9.0] and peaks["residual_median"].tolist() == [0.2, 0.3]
