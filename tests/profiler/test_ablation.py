"""Experts are switched off and on again exactly; controls, verdicts and documents say what was done."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moescope.errors import CorpusError, InputError, ModelError
from profiler import evaluate
from profiler.ablation import Expert, parse_experts
from profiler.ablation.experts import random_experts, same_layer_experts
from profiler.ablation.measure import ablate
from profiler.ablation.report import document, layer_table, sink_decays, verdict
from profiler.ablation.switch import routed_experts, switched_off
from profiler.capture.discovery import find_moe_layers
from store.evaluations import evaluation_text
from tests.profiler.capture.tiny import batch, build, output_of, recorded_calls
from tests.profiler.test_evaluate import batches

# Plain; transposed with biases; shared experts; several matrices in one parameter; no gate.
FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "dbrx", "nemotron_h")


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_names() -> None:
    assert parse_experts("3:82, 1:68;2:92") == [
        Expert(1, 0, "routed", 68),
        Expert(2, 0, "routed", 92),
        Expert(3, 0, "routed", 82),
    ]
    assert parse_experts("33:shared,8:24") == [Expert(8, 0, "routed", 24), Expert(33, 0, "shared", 0)]
    assert parse_experts("2.1:7") == [Expert(2, 1, "routed", 7)]
    assert [str(one) for one in parse_experts("2.1:7,1:shared")] == ["1:shared", "2.1:7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expert '' is not LAYER:EXPERT"),
        ("1-2", "'1-2' is not"),
        ("1:2,1:2", "1:2 stands there twice"),
        ("1:-1", "'1:-1' is not"),
    ],
)
def test_names_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_experts(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_off_means_the_output_without_that_expert(family: str) -> None:
    model, inputs = build(family), batch(padding="right")
    before, layer = state(model), find_moe_layers(model)[1]
    with recorded_calls(model) as calls, torch.no_grad():
        plain = output_of(model(**inputs))
    used = int(calls[1].ids[0].flatten()[0])
    outputs: list[Tensor] = []
    handle = layer.experts.register_forward_hook(
        lambda module, args, output: outputs.append(output.reshape(-1, output.shape[-1]))
    )
    with (
        switched_off([layer], [Expert(layer.layer, 0, "routed", used)]),
        recorded_calls(model) as after,
        torch.no_grad(),
    ):
        model(**inputs)
    handle.remove()
    # The router chose as before, with the same weights, and the layer puts out the sum over the other experts.
    assert torch.equal(calls[1].ids[0], after[1].ids[0])
    torch.testing.assert_close(calls[1].weights[0], after[1].weights[0])
    _, rows = calls[1].rows()
    kept = (calls[1].ids[0] != used).double() * calls[1].weights[0].double()
    expected = (torch.from_numpy(rows) * kept[..., None]).sum(1)
    torch.testing.assert_close(outputs[0].double(), expected, atol=1e-4, rtol=1e-4)
    assert unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(output_of(model(**inputs)), plain)


def test_shared_experts_can_be_switched_off() -> None:
    model = build("deepseek_v3")
    before, layer = state(model), find_moe_layers(model)[0]
    assert layer.shared is not None
    seen: list[float] = []
    layer.shared.module.register_forward_hook(lambda module, args, output: seen.append(float(output.abs().max())))
    with switched_off([layer], [Expert(layer.layer, 0, "shared")]), torch.no_grad():
        model(**batch())
    assert seen == [0.0]
    assert unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_restored_after_an_error_and_an_interrupt(error: type[BaseException]) -> None:
    model = build("olmoe")
    before = state(model)

    def fail(number: int, passes: int, name: str, tokens: int) -> None:
        if number == 2:
            assert not unchanged(model, before)
            raise error

    with pytest.raises(error):
        ablate(model, batches, experts=parse_experts("1:2,2:0"), controls=1, progress=fail)
    assert unchanged(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_refused_before_anything_is_read() -> None:
    def no_text() -> Any:
        raise AssertionError

    cases = [
        ("olmoe", "9:0", InputError, "no MoE layer 9; it has 0, 1, 2, 3"),
        ("olmoe", "1:99", InputError, "layer 1 has no expert 99: it has 0 to 7"),
        ("olmoe", "1:0,1:shared", InputError, "layer 1 has no shared experts"),
        ("olmoe", "1.1:0", InputError, "no MoE layer 1"),
    ]
    for family, names, kind, message in cases:
        model = build(family)
        before = state(model)
        with pytest.raises(kind, match=message):
            ablate(model, no_text, experts=parse_experts(names))
        assert unchanged(model, before)
    with pytest.raises(InputError, match="no expert to switch off"):
        ablate(build("olmoe"), no_text, experts=[])
    with pytest.raises(ModelError, match="no language-model head"):
        ablate(build("qwen3_vl_moe_text"), batches, experts=parse_experts("1:0"))
    with pytest.raises(CorpusError, match="nothing to predict"):
        ablate(build("olmoe"), list, experts=parse_experts("1:0"))


def test_controls_are_as_many_and_never_the_chosen_ones() -> None:
    layers = find_moe_layers(build("olmoe"))
    available, chosen = routed_experts(layers), parse_experts("1:2,1:3,3:0")
    assert len(available) == 4 * 8
    anywhere = [random_experts(chosen, available, seed=seed) for seed in range(30)]
    same = [same_layer_experts(chosen, available, seed=seed) for seed in range(30)]
    for drawn in (*anywhere, *same):
        assert len(set(drawn)) == 3 and not set(drawn) & set(chosen)
    assert all([one.layer for one in drawn] == [1, 1, 3] for drawn in same)
    assert {one.layer for drawn in anywhere for one in drawn} == {0, 1, 2, 3}
    assert random_experts(chosen, available, seed=4) == anywhere[4]  # the seed says it all
    everything = [one for one in available if one.layer == 1]
    assert same_layer_experts(everything, available, seed=0) == []
    found = ablate(build("olmoe"), batches, experts=everything, controls=1)
    assert [control.name for control in found.controls] == ["random"]
    assert "not enough other experts for the control 'same layers'" in found.notes[0]


def test_figures_equal_measurements_one_by_one() -> None:
    model, chosen = build("olmoe"), parse_experts("1:2,2:0")
    found = ablate(model, batches, experts=chosen, controls=2, seed=7)
    base = evaluate.perplexity(model, batches())
    with switched_off(find_moe_layers(model), chosen):
        after = evaluate.perplexity(model, batches())
    assert found.base.perplexity.value == base.value
    assert found.ablated.perplexity.value == after.value
    assert found.ablated.ratio.value == pytest.approx(after.value / base.value)
    assert [(one.name, one.seed) for one in found.controls] == [
        ("random", 7), ("random", 8), ("same layers", 7), ("same layers", 8)]  # fmt: skip
    table = layer_table(found)
    hidden: list[Tensor] = []
    handle = model.model.layers[2].register_forward_hook(lambda module, args, output: hidden.append(output))
    with torch.no_grad():
        for part in batches():
            mask = torch.from_numpy(part.attention_mask)
            model(input_ids=torch.from_numpy(part.input_ids), attention_mask=mask)
            hidden[-1] = hidden[-1][mask.bool()]
    handle.remove()
    assert table["residual_max"][2] == pytest.approx(max(float(one.abs().max()) for one in hidden))
    # The worst decay of any control, and the mean over layers of each pass.
    control = found.controls[3]
    decays = sink_decays(found, control)
    expected = [
        1 - float(np.mean(np.array(after) / np.array(before)))
        for before, after in zip(
            found.base.outliers.attention["sink_sum"], control.outliers.attention["sink_sum"], strict=True
        )
    ]
    np.testing.assert_allclose(decays["sink_decay"], expected, atol=1e-12)
    worst = np.max([sink_decays(found, one)["sink_decay"].to_numpy() for one in found.controls], axis=0)
    np.testing.assert_allclose(table["control_sink_decay"], worst)
    kept = document(found, model={}, data={})["controls"][3]
    assert kept["sink_decay"] == pytest.approx(np.mean(expected))
    assert kept["residual_max"] == control.outliers.residual["absolute_max"].max()
    # Layers before the first change are as they were.
    assert table["sink_decay"][:2].to_list() == [0.0, 0.0]
    assert table["residual_max"][0] == table["residual_max_ablated"][0]
    assert table["residual_max"][1] != table["residual_max_ablated"][1] or table["sink_decay"][2] != 0.0


def test_the_document_is_plain_json() -> None:
    found = ablate(build("qwen3_next"), lambda: batches(1, rows=1), experts=parse_experts("1:2"), controls=1)
    content = document(found, model={"name": "tiny"}, data={"files": ["a.txt"]})
    text = evaluation_text(content)
    assert json.loads(text) == content
    assert content["verdict"]["more_than_controls"] is None
    assert "one sequence has no interval" in content["verdict"]["sentence"]
    assert content["base"]["perplexity"]["low"] is None
    assert [layer["sink"] is None for layer in content["layers"]] == [True, True, True, False]  # linear attention
    assert math.isfinite(content["layers"][3]["sink_decay"])


def test_shared_experts_beside_routed_controls() -> None:
    model = build("deepseek_v3")
    layer = find_moe_layers(model)[0].layer
    found = ablate(model, batches, experts=parse_experts(f"{layer}:shared"), controls=1)
    assert found.ablated.ratio.value != 1.0
    assert [one.experts[0].kind for one in found.controls] == ["routed", "routed"]
    assert found.controls[1].experts[0].layer == layer
    assert "Shared experts see every token" in found.notes[0]


def test_without_controls_nothing_is_judged() -> None:
    found = ablate(build("olmoe"), batches, experts=parse_experts("1:2"), controls=0)
    assert verdict(found).more_than_controls is None
    assert "no control to compare with" in verdict(found).sentence


def test_progress_counts_passes_and_tokens() -> None:
    told: list[tuple[int, int, str, int]] = []
    ablate(build("olmoe"), batches, experts=parse_experts("1:2"), controls=1, progress=lambda *all: told.append(all))
    assert [entry[0] for entry in told] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {entry[1] for entry in told} == {4}
    assert [entry[2] for entry in told[::2]] == ["base", "ablated", "random", "same layers"]
    assert [entry[3] for entry in told[:2]] == [27, 54]
