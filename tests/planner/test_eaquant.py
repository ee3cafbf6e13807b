"""EAQuant's plans: channels from what the run saw, widths, what they cost, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import planner
import store
from compressor.memory import edited
from compressor.plan import Plan, QuantizeStep
from moescope.errors import ModelError, PlanError
from tests.compressor.edited_models import near
from tests.compressor.edited_models import run as logits
from tests.planner.collected import collected, sample
from tests.profiler.capture.tiny import batch, build, recorded_calls

BITS = 5.3
"""Of weights at 4 bits in groups of 16 with zero points, 5.25."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    opened = collected(build("qwen2_moe"), tmp_path_factory.mktemp("runs"), level="activations")
    yield opened
    opened.close()


def step_of(plan: Plan) -> QuantizeStep:
    (step,) = plan.steps
    assert isinstance(step, QuantizeStep)
    return step


def _largest_inputs(model: Any) -> dict[int, np.ndarray]:
    """Layer -> largest |x| of each channel that entered its experts, by plain hooks on the same text."""
    found: dict[int, np.ndarray] = {}
    for seed in (1, 2):
        inputs = batch(rows=3, length=24, seed=seed)
        with recorded_calls(model) as calls, torch.no_grad():
            model(**inputs)
        real = inputs["attention_mask"].bool().flatten()
        for one in calls:
            largest = one.hidden[0].reshape(len(real), -1)[real].abs().amax(0).numpy()
            found[one.layer.layer] = np.maximum(found.get(one.layer.layer, 0), largest)
    return found


def test_channels_are_the_largest_inputs_of_the_text(run: store.Run) -> None:
    plan = planner.make(run, preset="eaquant", bits=BITS)
    step = step_of(plan)
    wanted = _largest_inputs(build("qwen2_moe"))
    assert {one.layer for one in step.channels} == {one.layer for one in step.layers} == set(wanted)
    for one in step.channels:
        np.testing.assert_allclose(one.values(plan.source.hidden_size), wanted[one.layer], rtol=1e-5)


def test_widths_are_uniform(run: store.Run) -> None:
    plan = planner.make(run, preset="eaquant", bits=BITS, activation_bits=8)
    step = step_of(plan)
    assert (step.form, step.activation_bits, step.smoothing, step.method) == ("dense", 8, 0.6, "eaquant")
    assert {one.of(part) for layer in step.layers for one in layer.experts for part in ("gate", "up", "down")} == {4}
    assert {one.role for layer in step.layers for one in layer.experts} == {"routed", "shared"}
    assert Plan.parse(plan.text()) == plan == planner.make(run, preset="eaquant", bits=BITS, activation_bits=8)
    assert plan.estimate.bytes_saved == 0
    assert step_of(planner.make(run, preset="eaquant", bits=9.3, smoothing=0.5)).layers[0].experts[0].up == 8


def test_a_width_needs_no_budget(run: store.Run) -> None:
    for asked, width in (({}, 4), ({"weight_bits": 2}, 2), ({"weight_bits": 3, "bits": BITS}, 3)):
        plan = planner.make(run, preset="eaquant", **asked)
        step = step_of(plan)
        experts = [one for layer in step.layers for one in layer.experts]
        assert {one.of(part) for one in experts for part in ("gate", "up", "down")} == {width}
        assert plan.target.bits == asked.get("bits") and plan.target.memory is None
    with pytest.raises(PlanError, match="5.3 bits per weight cannot be met: widths 8 in"):
        planner.make(run, preset="eaquant", weight_bits=8, bits=BITS)


def test_notes_say_what_the_text_lacks(run: store.Run) -> None:
    notes = " ".join(planner.make(run, preset="eaquant", bits=BITS).evidence[0].notes)
    load = run.table("expert_load").group_by("layer", "expert").agg(pl.col("tokens").sum())
    shape = run.layers[0]
    assert len(load) == shape.num_experts * len(run.layers)  # nobody got none
    fewest = load["tokens"].min()
    assert f"got the fewest tokens, {fewest:,}" in notes
    assert f"here {2 * shape.top_k * 128 * 4096 / shape.num_experts:,.0f}" in notes
    assert "Activations of 4 bits are the engine's" in notes and "control" not in notes
    assert "Activations" not in " ".join(
        planner.make(run, preset="eaquant", bits=BITS, activation_bits=None).evidence[0].notes
    )


def test_plans_are_measured_in_memory(run: store.Run) -> None:
    model = build("qwen2_moe")
    before = logits(model)
    errors = {}
    for bits, narrow in ((BITS, 4), (BITS, 8), (9.3, 8)):
        with edited(model, planner.make(run, preset="eaquant", bits=bits, activation_bits=narrow)):
            errors[bits, narrow] = float((logits(model) - before).norm() / before.norm())
    assert errors[BITS, 4] > errors[BITS, 8] > errors[9.3, 8] > 0
    assert torch.equal(logits(model), before)


def test_a_plan_follows_a_cut(run: store.Run) -> None:
    plan = planner.make(run, preset="frequency", share=0.25, bits=BITS, quantizer="eaquant", form="uniform")
    assert [step.step for step in plan.steps] == ["drop", "quantize"] and plan.steps[1].form == "dense"
    model = build("qwen2_moe")
    drop = plan.model_copy(update={"steps": plan.steps[:1]})
    step = plan.steps[1]
    assert isinstance(step, QuantizeStep)
    as_they_are = [layer.model_copy(update={"experts": ()}) for layer in step.layers]
    alone = step.model_copy(update={"layers": tuple(as_they_are), "activation_bits": None})
    with edited(model, drop):
        wanted = logits(model)
    with edited(model, plan.model_copy(update={"steps": (plan.steps[0], alone)})):
        near(logits(model), wanted)


def test_older_runs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read = store.Run.table

    def without(run: store.Run, name: str, **chosen: Any) -> pl.DataFrame:
        frame = read(run, name, **chosen)
        if name != "expert_vector":
            return frame
        return frame.with_columns(input_max=pl.lit(None, frame.schema["input_max"]))

    with sample() as opened:
        planner.make(opened, preset="eaquant", bits=4.5)
        monkeypatch.setattr(store.Run, "table", without)
        with pytest.raises(PlanError, match="which older versions did not record: collect it with --level activations"):
            planner.make(opened, preset="eaquant", bits=4.5)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"activation_bits": 6}, "activations of 6 bits are not known: use 4, 8, or none"),
        ({"smoothing": 1.5}, "smoothing 1.5 is outside"),
        ({"form": "packed"}, "has no form 'packed': it has dense"),
        ({"bits": 1.5}, "cannot be met"),
        ({"bits": None, "share": 0.25}, "removes nothing: give bits"),
        ({"bits": None, "memory": 300_000}, "form dense keeps the type of the source and saves no memory: give bits"),
    ],
)
def test_what_cannot_be_is_refused(run: store.Run, asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        planner.make(run, preset="eaquant", **{"bits": BITS, **asked})


def test_other_families_are_refused_when_they_are_edited(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = build("flex_olmo")
    with collected(model, tmp_path_factory.mktemp("runs"), level="activations") as opened:
        plan = planner.make(opened, preset="eaquant", bits=BITS)
    with pytest.raises(ModelError, match="flex_olmo is not known to have a norm"), edited(model, plan):
        pass
