"""Widths of experts that were slimmed: groups have to divide the rows that are left, shared experts' too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compressor.memory import edited
from compressor.plan import ExpertBits, QuantizeLayer, QuantizeStep, SlimExpert, SlimLayer, SlimStep
from moescope.errors import PlanError
from tests.compressor.edit_plans import plan, source
from tests.compressor.edited_models import run as logits
from tests.profiler.capture.tiny import build

WIDTH = 32


@pytest.fixture(scope="module")
def model() -> Any:
    """Two layers with a shared expert of 32 neurons."""
    changes = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    return build("qwen2_moe", shared_expert_intermediate_size=WIDTH, **changes)


def slimmed(known: Any, kept: int, form: str, *, group_size: int = 16) -> Any:
    """Shared experts keep their first neurons, and have 2 bits."""
    mask, step = np.arange(WIDTH) < kept, {"method": "test", "group_size": group_size, "form": "dense"}
    cut = (SlimExpert.of(expert=0, role="shared", mask=mask),)
    bits = (ExpertBits(expert=0, role="shared", gate=2, up=2, down=2),)
    layers = [shape.layer for shape in known.layers]
    return plan(
        known,
        SlimStep(method="test", form=form, layers=tuple(SlimLayer(layer=one, experts=cut) for one in layers)),  # type: ignore[arg-type]
        QuantizeStep(**step, layers=tuple(QuantizeLayer(layer=one, experts=bits) for one in layers)),  # type: ignore[arg-type]
    )


def test_groups_that_do_not_divide_what_is_left_are_refused(model: Any) -> None:
    known = source(model)
    assert {shape.shared_width for shape in known.layers} == {WIDTH}
    with pytest.raises(PlanError, match="groups of 16 do not divide the 24 inputs of the down projections of layer 0"):
        slimmed(known, 24, "per_layer")
    assert slimmed(known, 24, "masked") and slimmed(known, 24, "per_layer", group_size=8)


def test_whole_groups_that_stay_are_quantized_as_if_the_others_were_zero(model: Any) -> None:
    """Neurons that go are the last group: it is all zeros where widths stay, and gone where they do not."""
    known = source(model)
    before = logits(model)
    found = []
    for form in ("per_layer", "masked"):
        with edited(model, slimmed(known, 16, form)):
            found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - before).abs().max() > 1e-2
