"""What an edit in memory leaves alone, puts back, and refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from compressor.memory import edit, edited
from compressor.plan import (
    DropLayer,
    DropStep,
    LayerShape,
    Source,
)
from moescope.errors import ModelError, PlanError
from tests.compressor.edit_plans import dropping, plan
from tests.compressor.edited_models import Snapshot, run
from tests.profiler.capture.tiny import build


def test_untouched_tensors_stay_the_same_objects_and_types() -> None:
    model = build("qwen2_moe", dtype=torch.bfloat16)
    model.requires_grad_(False)
    before = dict(model.named_parameters())
    with edited(model, dropping(model, {1: [0]}, form="per_layer")):
        after = dict(model.named_parameters())
        changed = {name for name in after if after[name] is not before[name]}
        assert changed == {
            f"model.layers.1.mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        }
        assert all(after[name].dtype == before[name].dtype and not after[name].requires_grad for name in after)
        np.testing.assert_array_equal(
            after["model.layers.1.mlp.experts.down_proj"].float(),
            before["model.layers.1.mlp.experts.down_proj"][1:].float(),
        )


def test_the_model_is_put_back_after_an_error() -> None:
    model = build("mixtral")
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError, match="inside"), edited(model, dropping(model, {1: [0]}, form="per_layer")):
        raise RuntimeError("inside")
    snapshot.require_same(model)


def test_edits_can_be_nested() -> None:
    model = build("olmoe")
    snapshot = Snapshot(model)
    with edited(model, dropping(model, {1: [0]}, form="per_layer")):
        once = run(model)
        with edited(model, dropping(model, {1: [6]}, form="per_layer")):  # the last of the seven that are left
            twice = run(model)
        assert torch.equal(run(model), once)
    snapshot.require_same(model)
    with edited(model, dropping(model, {1: [0, 7]}, form="per_layer")):
        assert torch.equal(run(model), twice)


def test_a_plan_for_another_model_is_refused() -> None:
    model = build("olmoe")
    snapshot = Snapshot(model)
    with pytest.raises(PlanError, match="8 experts of width 32 in layer 0; the model has 8 of width 48"):
        edit(model, dropping(build("olmoe", intermediate_size=32), {0: [1]}, form="per_layer"))
    with pytest.raises(PlanError, match="with 3 decoder layers"):
        edit(model, dropping(build("olmoe", num_hidden_layers=3), {0: [1]}, form="per_layer"))
    with pytest.raises(ModelError, match="no MoE layer"):
        edit(nn.Linear(2, 2), dropping(model, {0: [1]}, form="per_layer"))
    snapshot.require_same(model)


def test_experts_that_cannot_be_edited_are_refused() -> None:
    hashed = build("deepseek_v4")
    with pytest.raises(ModelError, match="table of token ids"):
        edit(hashed, dropping(hashed, {0: [1]}, form="per_layer"))
    keys = build("doge")
    shapes = tuple(LayerShape(layer=layer, num_experts=16, top_k=4, width=1) for layer in range(4))
    known = Source(model="doge", model_type="doge", hidden_size=64, expert_size=64, num_layers=4, layers=shapes)
    with pytest.raises(ModelError, match="no router with one row per expert"):
        edit(keys, plan(known, DropStep(method="test", form="per_layer", layers=(DropLayer(layer=0, experts=(1,)),))))
    away = build("olmoe")
    wanted = dropping(away, {0: [1]}, form="per_layer")
    with pytest.raises(ModelError, match="not in memory"):
        edit(away.to("meta"), wanted)
