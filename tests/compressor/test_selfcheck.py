"""The self-check passes what is right, and names what is wrong: exchanged, skipped and random experts, lost keys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.plan import DropLayer, DropStep, Plan
from compressor.selfcheck import difference, self_check
from tests.compressor.bit_plans import quantize
from tests.compressor.edit_plans import plan, source
from tests.profiler.capture.tiny import build

FAMILIES = ("olmoe", "qwen2_moe", "gpt_oss")
INFO: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": []}
IDS = torch.arange(10, 74)[None] % 90 + 2
WIDTHS = (8, 4, 2, None)


def widths(model: nn.Module, *before: Any) -> Plan:
    """8, 4, 2 and no bits by turns; shared experts have 4."""
    known = source(model)
    gone = {(step.layer, expert) for one in before for step in one.layers for expert in step.experts}

    def bits(layer: int, expert: int, part: str) -> Any:
        if (layer, expert) in gone:
            return None
        return 4 if expert < 0 else WIDTHS[expert % 4]

    return plan(known, *before, quantize(known, bits, group_size=0))


def result_of(model: nn.Module, what: Plan) -> nn.Module:
    """A copy of the model as the plan leaves it."""
    twin = copy.deepcopy(model)
    compressor.edit(twin, what)
    return twin


def experts_of(model: nn.Module, layer: int) -> dict[str, Tensor]:
    """The fused tensors of a layer."""
    found = {name: tensor for name, tensor in model.named_parameters() if f"layers.{layer}.mlp.experts." in name}
    return {name.rpartition(".")[2]: tensor for name, tensor in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_right_passes(family: str) -> None:
    model = build(family)
    what = widths(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = self_check(model, result_of(model, what), what, IDS, info=INFO)
    assert found.passed, found.failure
    assert found.weights is not None and found.logits is not None
    matrices = sum(entry.of(part) is not None for layer in what.steps[0].layers for entry in layer.experts
                   for part in ("gate", "up", "down"))  # fmt: skip
    assert len(found.weights.rows) == matrices > 0
    assert found.logits.tokens == 64 and found.logits.relative < 1e-6 and abs(found.logits.kl) < 1e-9
    assert found.not_checked == ()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def exchange(tensors: dict[str, Tensor], original: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        tensor[[0, 1]] = tensor[[1, 0]].clone()


def skip(tensors: dict[str, Tensor], original: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor[2] = original[name][2]


def lose(tensors: dict[str, Tensor], original: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        torch.manual_seed(1)
        tensor[1] = torch.randn_like(tensor[1]) * tensor[1].std()


def shift(tensors: dict[str, Tensor], original: dict[str, Tensor]) -> None:
    """The width of another expert: 8 bits where 2 were planned would be an error far below the band."""
    for name, tensor in tensors.items():
        tensor[2] = original[name][2] * 1.01


@pytest.mark.parametrize(
    ("damage", "verdict", "expert"),
    [(exchange, "wrong decode", 0), (skip, "skipped", 2), (lose, "wrong decode", 1), (shift, "outside band", 2)],
)
def test_what_is_wrong_is_named(damage: Callable[..., None], verdict: str, expert: int) -> None:
    model = build("olmoe")
    what = widths(model)
    result = result_of(model, what)
    with torch.no_grad():
        damage(experts_of(result, 2), experts_of(model, 2))
    found = self_check(model, result, what, IDS, info=INFO)
    assert found.weights is not None and not found.passed
    wrong = {(row.layer, row.expert, row.verdict) for row in found.weights.rows if row.verdict != "ok"}
    assert (2, expert, verdict) in wrong and {layer for layer, _, _ in wrong} == {2}
    assert f"expert {expert} of layer 2" in found.failure


def test_lost_keys_come_first() -> None:
    model = build("olmoe")
    what = widths(model)
    info = {**INFO, "missing_keys": {"model.layers.0.mlp.experts.down_proj"}}
    found = self_check(model, result_of(model, what), what, IDS, info=info)
    assert found.failure == "the result lacks model.layers.0.mlp.experts.down_proj"
    assert not found.content()["passed"]
    assert self_check(model, result_of(model, what), what, IDS).not_checked == ("keys: loading said nothing of them",)


def test_logits_find_what_no_expert_shows() -> None:
    model = build("olmoe")
    what = widths(model)
    result = result_of(model, what)
    with torch.no_grad():
        result.get_parameter("model.layers.1.self_attn.o_proj.weight").neg_()
    found = self_check(model, result, what, IDS, info=INFO)
    assert found.weights is not None and found.weights.passed
    assert "logits differ from the plan's" in found.failure
    other = self_check(model, result, what, IDS, info=INFO, exact=False)
    assert other.logits == found.logits and "nats from the source's, where the plan's widths make" in other.failure


def test_numbers_of_the_source_stay_when_experts_go() -> None:
    model = build("olmoe")
    layers = tuple(DropLayer(layer=shape.layer, experts=(0, 3)) for shape in source(model).layers)
    what = widths(model, DropStep(method="test", form="uniform", layers=layers))
    result = result_of(model, what)
    assert self_check(model, result, what, IDS, info=INFO).passed
    with torch.no_grad():
        for tensor in experts_of(result, 1).values():
            tensor[[0, 1]] = tensor[[1, 0]].clone()  # experts 1 and 2 of the source
    assert "expert 1 of layer 1" in self_check(model, result, what, IDS, info=INFO).failure


def test_differences_of_logits() -> None:
    source_logits = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    reference = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    found = difference(source_logits, reference, torch.zeros(1, 2, 2))

    def by_hand(one: float, two: float) -> float:
        """Mean over two tokens, of which the first is the same everywhere."""
        first, second = torch.tensor([one, 0.0]).softmax(-1), torch.tensor([two, 0.0]).softmax(-1)
        return float((first * (first / second).log()).sum()) / 2

    assert (found.tokens, found.largest, found.relative) == (2, 2.0, 1.0)
    assert found.kl == pytest.approx(by_hand(2, 0), abs=1e-6)
    assert found.moved == pytest.approx(by_hand(1, 0), abs=1e-6)
    assert found.meant == pytest.approx(by_hand(1, 2), abs=1e-6)
