"""Channels smoothed into weights, and activations on grids: the function stays, the grids are those of plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.apply import apply
from compressor.edits.activations import on_grid
from compressor.edits.quantize import to_grid
from compressor.edits.smooth import Smoothing, smoothing_scales
from compressor.families.norms import BLOCK_NORMS
from compressor.memory import edit, edited
from compressor.plan import ExpertBits, Plan, QuantizeLayer, QuantizeStep, SmoothLayer
from moescope.errors import ModelError, PlanError
from profiler.capture.discovery import inspect_model
from profiler.evaluation.routing import SelectionReader
from tests.compressor.apply_cases import reload, saved, source_of
from tests.compressor.edit_plans import plan
from tests.compressor.edited_models import Snapshot, merging, near, run
from tests.profiler.capture.tiny import batch, build, output_of

SMOOTHED = ("olmoe", "mixtral", "qwen2_moe", "qwen3_next", "deepseek_v3", "gpt_oss", "dbrx", "jamba", "lfm2_moe",
            "llama4_text", "granitemoeshared", "phimoe", "inkling_text")  # fmt: skip
"""Plain and gated shared experts, norms that add 1, norms with a bias, other names, weights that stand otherwise."""

NARROWED = ("olmoe", "gpt_oss", "dbrx", "longcat_flash", "gemma4_text", "nemotron_h", "qwen2_moe")
"""With and without gate, biases, packed, experts without weights, a norm behind each expert, a latent width."""


def channels(model: nn.Module, seed: int = 0) -> dict[int, np.ndarray]:
    """Layer -> largest magnitudes of its channels at random; the first is never used."""
    draw, known = np.random.default_rng(seed), source_of(model)
    found = {shape.layer: np.exp(draw.normal(size=known.hidden_size)).astype(np.float32) for shape in known.layers}
    for values in found.values():
        values[0] = 0
    return found


def quantizing(model: nn.Module, bits: Any = None, *, smoothing: float | None = 0.6, shared: bool = True,
               **step: Any) -> Plan:  # fmt: skip
    """All experts at one width; None = as they are."""
    known, found = source_of(model), channels(model)
    part = {"gate": bits if known.gated else None, "up": bits, "down": bits}
    layers = []
    for shape in known.layers:
        experts = [ExpertBits(expert=expert, **part) for expert in range(shape.num_experts)]
        if shape.shared_width and shared:
            experts.append(ExpertBits(expert=0, role="shared", **part))
        layers.append(QuantizeLayer(layer=shape.layer, experts=tuple(experts)))
    smooth = tuple(SmoothLayer.of(layer=layer, input_max=values) for layer, values in found.items())
    known_step = {"method": "test", "form": "dense", "group_size": 0, "smoothing": smoothing,
                  "channels": smooth if smoothing is not None else (), "layers": tuple(layers)}  # fmt: skip
    return plan(known, QuantizeStep(**{**known_step, **step}))


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_scales_are_the_largest_that_any_reader_asks_for(exponent: float) -> None:
    draw = np.random.default_rng(0)
    inputs, weights = draw.random(6), draw.random((4, 6))
    inputs[1], weights[2, 3], weights[:, 4] = 0.0, 0.0, 0.0
    wanted = []
    for channel in range(6):
        asked = [
            inputs[channel] ** exponent / weight ** (1 - exponent) for weight in weights[:, channel] if weight > 0
        ]  # fmt: skip
        wanted.append(max(asked) if asked and inputs[channel] > 0 else 1.0)
    found = smoothing_scales(torch.from_numpy(inputs), torch.from_numpy(weights), exponent)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)


def test_scales_rest_on_the_experts_and_the_router() -> None:
    model, layers = build("olmoe"), []
    for layer, values in channels(model).items():
        block = model.model.layers[layer].mlp
        largest = torch.cat([block.experts.gate_up_proj.abs().amax(1), block.gate.weight.abs().amax(0)[None]])
        asked = torch.from_numpy(values).double() ** 0.6 / largest.double() ** 0.4
        layers.append(torch.where(torch.from_numpy(values) > 0, asked.amax(0), 1.0))
    before = [layer.post_attention_layernorm.weight.detach().clone() for layer in model.model.layers]
    with edited(model, quantizing(model)):
        for layer, norm, scales in zip(model.model.layers, before, layers, strict=True):
            found = norm.double() / layer.post_attention_layernorm.weight.detach().double()
            torch.testing.assert_close(found, scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", SMOOTHED)
def test_smoothing_alone_changes_nothing(family: str) -> None:
    model = build(family)
    before, snapshot = run(model), Snapshot(model)
    weight = _first_projection(model)
    with edited(model, quantizing(model)):
        near(run(model), before, 1e-5)
        assert not torch.allclose(_first_projection(model), weight, rtol=0.05)
    snapshot.require_same(model)
    assert torch.equal(run(model), before)


def test_in_float64_it_changes_nothing_at_all() -> None:
    model = build("olmoe", experts_implementation="eager").double()
    model.set_experts_implementation("eager")
    before = run(model)
    with edited(model, quantizing(model)):
        near(run(model), before, 1e-12)


def _first_projection(model: nn.Module) -> Tensor:
    layer = inspect_model(model).layers[0]
    assert layer.layout is not None
    return layer.layout.up_weight(layer.experts, 0).detach().clone()


def test_grids_are_those_of_smoothed_weights() -> None:
    model = build("olmoe")
    wanted = quantizing(model, 4)
    step = wanted.steps[0]
    assert isinstance(step, QuantizeStep)
    with edited(model, quantizing(model)):
        smoothed = [layer.mlp.experts.gate_up_proj.detach().clone() for layer in model.model.layers]
    with edited(model, wanted):
        for layer, weights in zip(model.model.layers, smoothed, strict=True):
            width = weights.shape[1] // 2
            for expert in range(len(weights)):
                parts = [to_grid(rows, 4, step).values() for rows in (weights[expert, :width], weights[expert, width:])]
                assert torch.equal(layer.mlp.experts.gate_up_proj[expert], torch.cat(parts))


def test_outlier_channels_cost_less_where_they_are_smoothed() -> None:
    """One channel of the input is a hundred times the others': what EAQuant is for."""
    model = build("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[3] *= 100
            layer.mlp.experts.gate_up_proj[:, :, 3] /= 100
            layer.mlp.gate.weight[:, 3] /= 100
    before = run(model)
    found = {key: values.copy() for key, values in channels(model).items()}
    for values in found.values():
        values[:] = 2.0
        values[3] = 200.0
    smooth = tuple(SmoothLayer.of(layer=layer, input_max=values) for layer, values in found.items())
    errors = {}
    for exponent in (None, 0.6):
        more = {"channels": smooth} if exponent is not None else {}
        with edited(model, quantizing(model, None, smoothing=exponent, activation_bits=8, **more)):
            errors[exponent] = float((run(model) - before).norm() / before.norm())
    assert errors[0.6] < 0.5 * errors[None]


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_stand_on_one_grid_per_token(bits: int) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    values[2] = 0
    most = 2 ** (bits - 1) - 1
    for row, found in zip(values.tolist(), on_grid(values, bits).tolist(), strict=True):
        scale = max(map(abs, row)) / most or 1.0
        assert found == pytest.approx([round(value / scale) * scale for value in row], abs=1e-6)
        assert max(map(abs, found)) == pytest.approx(max(map(abs, row)))


@pytest.mark.parametrize("family", NARROWED)
def test_narrow_experts_are_the_experts_with_rounded_inputs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from compressor.edits import activations

    model = build(family)
    before, snapshot = run(model), Snapshot(model)
    narrow = quantizing(model, smoothing=None, activation_bits=8)
    with edited(model, narrow):
        found = run(model)
    snapshot.require_same(model)
    assert torch.equal(run(model), before)
    difference = float((found - before).norm() / before.norm())
    assert 1e-4 < difference < 0.25
    monkeypatch.setattr(activations, "on_grid", lambda values, bits: values)
    with edited(model, quantizing(model, smoothing=None, activation_bits=8, shared=False)):
        near(run(model), before, 5e-6)


def test_an_expert_with_narrow_inputs_by_hand() -> None:
    model = build("olmoe", num_hidden_layers=1)
    block, hidden = model.model.layers[0].mlp, torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    ids, weights = torch.tensor([[0, 2], [1, 2], [3, 0]]), torch.tensor([[0.5, 0.2], [0.3, 0.1], [0.4, 0.4]])
    hidden = hidden[:, : block.experts.down_proj.shape[1]]
    wanted = torch.zeros_like(hidden)
    for token in range(3):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ _rounded(hidden[token])).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            wanted[token] += weight * (block.experts.down_proj[expert] @ _rounded(inner)).detach()
    with edited(model, quantizing(model, smoothing=None, activation_bits=4)), torch.no_grad():
        torch.testing.assert_close(block.experts(hidden, ids, weights), wanted, rtol=1e-4, atol=1e-5)


def _rounded(row: Tensor) -> Tensor:
    scale = row.abs().max() / 7
    return (row / scale).round() * scale


def test_selections_are_still_seen() -> None:
    model = build("olmoe")
    reader = SelectionReader(model)
    inputs = batch()
    with edited(model, quantizing(model, 4, activation_bits=4)), torch.no_grad():
        list(reader.first_of(iter([(0, output_of(model(**inputs)))])))
        found = next(reader.first_of(output_of(model(**inputs)) for _ in range(1)))
    assert torch.isfinite(found).all() and len(reader.selections) == len(inspect_model(model).layers)


def test_merged_experts_are_smoothed_after_the_merge() -> None:
    model = build("olmoe")
    merge = merging(source_of(model), [(1, 4), (0, 6)])
    with edited(model, merge):
        wanted = run(model)
    smooth = quantizing(model)
    step = smooth.steps[0]
    assert isinstance(step, QuantizeStep)
    left = {group.lead for group in merge.steps[0].layers[0].groups}  # type: ignore[union-attr]
    layers = tuple(
        layer.model_copy(update={"experts": tuple(one for one in layer.experts if one.expert in left)})
        for layer in step.layers
    )
    with edited(model, plan(smooth.source, *merge.steps, step.model_copy(update={"layers": layers}))):
        near(run(model), wanted, 1e-5)


@pytest.mark.parametrize("family", ["minimax", "cohere2_moe", "flex_olmo", "gemma4_text", "zaya"])
def test_families_whose_norm_serves_others_are_refused(family: str) -> None:
    model = build(family)
    assert model.config.model_type not in BLOCK_NORMS
    before = run(model)
    with (
        pytest.raises(ModelError, match="is not known to have a norm that serves its experts alone"),
        edited(model, quantizing(model)),
    ):
        pass
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe", "switch_transformers"])
def test_experts_that_are_called_otherwise_are_not_narrowed(family: str) -> None:
    model = build(family)
    with (
        pytest.raises(ModelError, match=r"is not called with \(hidden, ids, weights\).*plan without activation_bits"),
        edited(model, quantizing(model, smoothing=None, activation_bits=8)),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"form": "packed"}, "norms and routers, which form packed lacks: use form dense"),
        ({"channels": ()}, "smoothing takes an exponent and the channels of every layer, or neither"),
        ({"channels": 1}, "stands 1 times among the layers and 0 times among the channels"),
        ({"channels": 2}, "layer 0 has 3 channels, not"),
        ({"channels": 3}, "not finite"),
    ],
)
def test_what_cannot_be_smoothed_is_refused(change: dict[str, Any], reason: str) -> None:
    model = build("olmoe")
    step: Any = quantizing(model).steps[0]
    bad = {
        1: step.channels[:-1],
        2: (SmoothLayer.of(layer=0, input_max=np.ones(3)), *step.channels[1:]),
        3: (SmoothLayer.of(layer=0, input_max=np.full(source_of(model).hidden_size, np.inf)), *step.channels[1:]),
    }
    change = {name: bad.get(value, value) if name == "channels" else value for name, value in change.items()}
    with pytest.raises((PlanError, ValueError), match=reason):
        quantizing(model, **change)


def test_an_experts_own_channels_are_no_norms() -> None:
    with pytest.raises(PlanError, match="read 24 channels of their own"):
        quantizing(build("nemotron_h"))


def test_checkpoints_hold_neither(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "before")
    for wanted, reason in (
        (quantizing(model, 4, smoothing=None, activation_bits=8), "activations to 8 bits, which is the engine's to do"),
        (quantizing(model, 4), "smooths channels"),
    ):
        with pytest.raises(PlanError, match=reason):
            apply(wanted, source=tmp_path / "before", destination=tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_weights_keep_their_type() -> None:
    smoothing = Smoothing(0.5, torch.ones(3))
    smoothing.decide([], torch.tensor([[4.0, 1.0, 0.25]]))
    torch.testing.assert_close(smoothing.scales, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    assert smoothing.columns(torch.ones(2, 3, dtype=torch.bfloat16)).tolist() == [[0.5, 1.0, 2.0]] * 2
    assert smoothing.gain(torch.ones(3, dtype=torch.bfloat16)).tolist() == [2.0, 1.0, 0.5]
    assert smoothing.gain(torch.zeros(3), offset=1.0).tolist() == [1.0, 0.0, -0.5]
    with pytest.raises(RuntimeError, match="decide"):
        _ = Smoothing(0.5, torch.ones(3)).scales


@pytest.mark.parametrize("family", ["olmoe", "qwen3_next"])
def test_a_smoothed_model_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = build(family)
    edit(model, quantizing(model, 8))
    wanted = run(model)
    model.save_pretrained(tmp_path)
    near(run(reload(family, tmp_path)), wanted, 1e-6)
