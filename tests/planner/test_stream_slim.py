"""Slimming by the stream: neurons by energies recomputed token by token, and counted to the unit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import planner
import store
from compressor.plan import Protected, SlimStep
from compressor.plan.result import neurons_after
from moescope.errors import PlanError
from planner.guard import Guard
from planner.slim import stream
from tests.planner.collected import collected, task
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import observe, watched

LAYERS, EXPERTS, WIDTH = 2, 8, 32


@dataclass
class Case:
    """A run, and what silencing each neuron does to the stream, from every token in float64."""

    run: store.Run
    parts: NDArray[np.float64]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = build("olmoe", num_hidden_layers=LAYERS, intermediate_size=WIDTH)
    parts = np.zeros((LAYERS, EXPERTS, WIDTH))
    for place, own in enumerate(observe(model).layers):
        down = (own.layer.experts.down_proj.detach().double().numpy() ** 2).sum(1)
        for expert in range(EXPERTS):
            token, slot = np.nonzero(own.ids == expert)
            gate = own.gate[token, slot, None]
            energy = ((gate * own.activation[token, slot]) ** 2).sum(0) * down[expert]
            output = ((gate * own.output[token, slot]) ** 2).sum(1)
            # The expert's part of the stream, token by token, shared out by what its neurons put in over all tokens.
            part = (output / own.stream[token]).sum() / len(own.ids)
            parts[place, expert] = part * energy / energy.sum()
    return Case(watched(model, tmp_path_factory.mktemp("slim")), parts)


def _masks(run: store.Run, form: str, share: float, **more: object) -> NDArray[np.bool_]:
    """(layers, experts, neurons) that stay."""
    plan = planner.make(run, preset="stream_slim", form=form, share=share, guard=False, **more)  # type: ignore[arg-type]
    masks, found = neurons_after(plan), np.ones((LAYERS, EXPERTS, WIDTH), dtype=bool)
    for (layer, _, expert, role), mask in masks.items():
        assert role == "routed"
        found[layer, expert] = mask
    return found


@pytest.mark.parametrize("share", [0.1, 0.35, 0.8])
def test_the_neurons_that_turn_the_stream_least_go(case: Case, share: float) -> None:
    kept = _masks(case.run, "masked", share)
    count = math.floor(share * kept.size + 1e-9)
    assert (~kept).sum() == count
    order = np.sort(case.parts.ravel())
    # Two neurons may change places where their figures, summed in float32, are the same to four digits.
    assert case.parts[~kept].max() <= order[count - 1] * (1 + 1e-4)
    assert case.parts[kept].min() >= order[count] * (1 - 1e-4)
    assert len(set((~kept).sum((1, 2)))) == LAYERS  # layers compete, and one gives more


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.55])
def test_layers_give_what_was_asked_to_the_unit(case: Case, share: float, multiple: int) -> None:
    """floor(share x all / multiple) units over the layers; a layer keeps a unit at least."""
    kept = _masks(case.run, "per_layer", share, multiple=multiple)
    gone = (~kept).sum(2)
    assert (gone == gone[:, :1]).all() and not (gone % multiple).any()
    units = math.floor(share * LAYERS * WIDTH / multiple + 1e-9)
    assert gone[:, 0].sum() == units * multiple
    lost = np.cumsum(np.pad(np.sort(case.parts, axis=2).sum(1), ((0, 0), (1, 0))), axis=1)
    counts = range(0, WIDTH, multiple)
    best = min(lost[0, one] + lost[1, two] for one in counts for two in counts if one + two == units * multiple)
    assert case.parts[~kept].sum() == pytest.approx(best, rel=1e-4)


def test_every_expert_keeps_its_best_where_all_are_as_wide(case: Case) -> None:
    kept = _masks(case.run, "uniform", 0.5, multiple=16)
    assert (kept.sum(2) == 16).all()
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        own = case.parts[layer, expert]
        assert own[~kept[layer, expert]].max() <= own[kept[layer, expert]].min() * (1 + 1e-4)


def test_factors_spare_the_layer_that_is_dear(case: Case) -> None:
    gone = [
        (~_masks(case.run, "per_layer", 0.5, multiple=1, factors=factors)).sum((1, 2)).tolist()
        for factors in ((1000.0, 1.0), (1.0, 1.0), (1.0, 1000.0))
    ]
    assert gone[0][0] < gone[1][0] < gone[2][0]
    kept = _masks(case.run, "masked", 0.4, factors=(3.0, 0.5))
    weighed = case.parts * np.array([3.0, 0.5])[:, None, None]
    assert weighed[~kept].max() <= np.sort(weighed.ravel())[(~kept).sum() - 1] * (1 + 1e-4)


def test_super_experts_are_spared(case: Case) -> None:
    guard = Guard(protected=(Protected(layer=1, expert=3, reason="test"),), active=True)
    (masked,) = stream.draft(task(case.run, guard=guard, share=0.9, form="masked")).steps
    (whole,) = stream.draft(task(case.run, guard=guard, share=0.4, form="per_layer"), multiple=4).steps
    assert isinstance(masked, SlimStep) and isinstance(whole, SlimStep)
    named = {(layer.layer, one.expert) for layer in masked.layers for one in layer.experts}
    assert (1, 3) not in named and len(named) == LAYERS * EXPERTS - 1
    assert {layer.layer for layer in whole.layers} == {0}
    with pytest.raises(PlanError, match="asks for more neurons than the layers without super experts have"):
        stream.draft(task(case.run, guard=guard, share=0.6, form="per_layer"), multiple=4)


def test_shared_experts_keep_theirs(tmp_path: Path) -> None:
    model = build("qwen2_moe", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with collected(model, tmp_path, level="activations") as run:
        for form in ("masked", "per_layer", "uniform"):
            plan = planner.make(run, preset="stream_slim", form=form, share=0.5)
            assert {role for *_, role in neurons_after(plan)} == {"routed"}


def test_runs_that_did_not_see_the_stream_are_refused(tmp_path: Path) -> None:
    with (
        collected(build("olmoe", num_hidden_layers=2), tmp_path, level="errors", errors_every=16) as run,
        pytest.raises(PlanError, match="'stream_slim' needs activations: collect it with --level activations"),
    ):
        planner.make(run, preset="stream_slim", share=0.5)
