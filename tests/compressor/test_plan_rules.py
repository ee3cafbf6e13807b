"""What a plan may not ask for, each rule with the sentence that it is refused by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from compressor.plan import (
    DropLayer,
    DropStep,
    GivenUp,
    LayerShape,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Protected,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Step,
)
from moescope.errors import PlanError
from tests.compressor.planned import EXPERTS, WIDTH, plan, source

LAYERS = (1, 2, 3)


def drop(*experts: int, layers: tuple[int, ...] = LAYERS, **changes: Any) -> DropStep:
    return DropStep(method="reap", layers=tuple(DropLayer(layer=one, experts=experts) for one in layers), **changes)


def group(*members: int, **changes: Any) -> MergeGroup:
    weights = tuple([1 / len(members)] * len(members))
    return MergeGroup(**{"lead": members[0], "members": members, "weights": weights, **changes})


def merge(*groups: MergeGroup, given_up: tuple[int, ...] = (), layers: tuple[int, ...] = LAYERS, **changes: Any) -> Any:
    gone = tuple(GivenUp(expert=expert, weight=0.1) for expert in given_up)
    entries = tuple(MergeLayer(layer=one, groups=groups, given_up=gone) for one in layers)
    return MergeStep(**{"grouping": "m_smoe", "method": "average", "layers": entries, **changes})


def slim(kept: int, *, experts: range = range(EXPERTS), layers: tuple[int, ...] = LAYERS, **changes: Any) -> SlimStep:
    mask = np.arange(WIDTH) < kept
    entries = tuple(SlimExpert.of(expert=one, mask=mask) for one in experts)
    named = {"method": "width", "form": "uniform", "width": kept, **changes}
    return SlimStep(layers=tuple(SlimLayer(layer=one, experts=entries) for one in layers), **named)


SINGLES = tuple(group(one) for one in range(6))
PAIRS = tuple(group(one, one + 1) for one in range(0, EXPERTS, 2))
FEW = (group(0, 1, 2), *(group(one) for one in range(3, 8)))
SUPER = Protected(layer=2, expert=5, reason="super expert")
SUPER_SHARED = Protected(layer=2, expert=0, role="shared", reason="super expert")
SHARED = SlimLayer(layer=2, experts=(SlimExpert.of(expert=0, role="shared", mask=np.arange(6) < 3),))

GOOD: dict[str, tuple[tuple[Step, ...], dict[str, Any]]] = {
    "drop": ((drop(0, 3),), {}),
    "drop down to k": ((drop(0, 1, 2, 3, 4, 5),), {}),
    "per layer": ((drop(0, 1, layers=(2,), form="per_layer"),), {}),
    "padded with a bias": ((drop(0, 1, layers=(2,), form="padded"),), {"selection_bias": True}),
    "groups alike": ((drop(0, 4),), {"groups": 2, "chosen_groups": 1}),
    "merge": ((merge(*PAIRS),), {}),
    "segments": ((merge(*SINGLES, given_up=(6, 7), method="segments", threshold=0.6),), {}),
    "subspace": ((merge(*PAIRS, method="subspace", rank=3),), {}),
    "router stays": ((merge(*PAIRS, layers=(2,), form="shared"),), {}),
    "router stays, fewer than k": ((merge(group(*range(8)), form="shared"),), {}),
    "router stays, groups differ": ((merge(*FEW, form="shared"),), {"groups": 2, "chosen_groups": 1}),
    "router stays, fewer layers": (
        (merge(*PAIRS, layers=(1,), form="shared"), DropStep(method="x", decoder_layers=(0,)), slim(8)),
        {},
    ),
    "slim": ((slim(8),), {}),
    "drop and slim": ((drop(7), slim(8, experts=range(7))), {}),
    "ragged": ((slim(3, experts=range(2), form="masked", width=None),), {}),
    "shared": ((SlimStep(method="width", form="masked", layers=(SHARED,)),), {}),
    "layers": ((DropStep(method="block_influence", decoder_layers=(0, 2), blocks=(1,)),), {}),
    "super expert kept": ((drop(0, 3),), {"protected": (SUPER, SUPER_SHARED)}),
    "super expert fixed": (
        (merge(*SINGLES[:5], group(5, fixed=True), given_up=(6, 7), method="segments", threshold=0.6),),
        {"protected": (SUPER,)},
    ),
    "uniform width spares none": ((slim(8),), {"protected": (SUPER,)}),
}

BAD: dict[str, tuple[tuple[Step, ...], dict[str, Any], str]] = {
    "no MoE layer": ((drop(0, layers=(0,)),), {}, "drop step names layer 0, which is no MoE layer"),
    "no such expert": ((drop(8),), {}, r"names expert 8 of layer 1, which has experts 0\.\.7"),
    "twice": ((drop(0), merge(*PAIRS)), {}, "two steps of the plan drop or merge experts of layer 1"),
    "dense block": ((DropStep(method="x", blocks=(0,)),), {}, "drops the MoE block of layer 0, which has none"),
    "layer beyond": ((DropStep(method="x", decoder_layers=(4,)),), {}, r"decoder layer 4; the model has 0\.\.3"),
    "no layer left": ((DropStep(method="x", decoder_layers=(0, 1, 2, 3)),), {}, "drops every decoder layer"),
    "fewer than k": ((drop(*range(7)),), {}, "layer 1 would keep 1 of 8 experts, fewer than the 2"),
    "uneven": ((drop(0, layers=(1, 2)),), {}, "layers would keep 7 to 8 experts, which no stock engine loads"),
    "padded without a bias": ((drop(0, form="padded"),), {}, "toy_moe chooses experts without a bias"),
    "forms": ((drop(0, layers=(1,)), merge(*PAIRS, layers=(2, 3), form="per_layer")), {}, "in different forms"),
    "forms, one shared": (
        (drop(0, layers=(1,)), merge(*PAIRS, layers=(2, 3), form="shared")), {}, "in different forms: shared, uniform"
    ),
    "softmax over fillers": (
        (drop(0, form="padded"),), {"selection_bias": True, "model_type": "longcat_flash"}, "a softmax over all experts"
    ),
    "shared, given up": (
        (merge(*SINGLES, given_up=(6, 7), method="segments", threshold=0.6, form="shared"),), {},
        "layer 1 is stored in form shared, .*: it goes without method segments",
    ),
    "shared, mean rows": ((merge(*PAIRS, router="mean", form="shared"),), {}, "it goes without mean rows"),
    "groups differ": ((merge(*FEW),), {"groups": 2, "chosen_groups": 1}, "would keep 2, 4 experts"),
    "group left behind": ((drop(0, 1),), {"groups": 2}, "would keep 2, 4 experts: drop the same number from each"),
    "groups too small": (
        (drop(0, 1, 2, 4, 5, 6),), {"groups": 2, "chosen_groups": 1}, "keep 1 experts in each of 2 groups"
    ),
    "missing member": ((merge(*PAIRS[:3]),), {}, "no partition of its experts 0..7"),
    "member twice": ((merge(*PAIRS[:3], group(5, 6, 7)),), {}, "no partition"),
    "lead elsewhere": ((merge(*PAIRS[:3], group(6, 7, lead=0)),), {}, "group 0 of layer 1 lacks its lead or a weight"),
    "weight missing": ((merge(*PAIRS[:3], group(6, 7, weights=(1.0,))),), {}, "lacks its lead or a weight"),
    "weights": ((merge(*PAIRS[:3], group(6, 7, weights=(0.5, 0.6))),), {}, "sum to 1.1, not to 1"),
    "negative": ((merge(*PAIRS[:3], group(6, 7, weights=(1.5, -0.5))),), {}, "weights of group 6"),
    "given up": ((merge(*SINGLES, given_up=(6, 7)),), {}, "which method 'average' cannot use: it takes segments"),
    "no rank": ((merge(*PAIRS, method="subspace"),), {}, "method 'subspace' of layer 1 goes with a rank"),
    "a rank": ((merge(*PAIRS, rank=3),), {}, "method 'average' of layer 1 goes without a rank"),
    "no threshold": ((merge(*SINGLES, given_up=(6, 7), method="segments"),), {}, "a threshold"),
    "two slims": ((slim(8), slim(8)), {}, "two slim steps"),
    "widths": ((slim(8, width=6),), {}, "would keep 8 neurons and the others 6"),
    "one whole": ((slim(8, experts=range(7)),), {}, "expert 7 of layer 1 keeps all its neurons, others 8"),
    "no width": ((slim(8, width=None),), {}, "slim step of form 'uniform' goes with a width"),
    "a width": ((slim(8, form="masked"),), {}, "slim step of form 'masked' goes without a width"),
    "second shared": (
        (SlimStep(method="x", form="masked", layers=(SlimLayer(layer=1, experts=(SlimExpert.of(
            expert=1, role="shared", mask=np.ones(6, bool)),)),)),), {}, "slims shared expert 1 of layer 1",
    ),
    "mask of another width": (
        (SlimStep(method="x", form="masked", layers=(SlimLayer(layer=1, experts=(SlimExpert.of(
            expert=1, mask=np.ones(40, bool)),)),)),), {}, "the neurons of routed expert 1 are not 12",
    ),
    "damaged mask": (
        (SlimStep(method="x", form="masked", layers=(SlimLayer(layer=1, experts=(SlimExpert(
            expert=1, kept="?"),)),)),), {}, "routed expert 1 cannot be read",
    ),
    "super expert dropped": ((drop(5),), {"protected": (SUPER,)}, "cuts routed expert 5 of layer 2, which it protects"),
    "super expert merged": ((merge(*PAIRS),), {"protected": (SUPER,)}, "cuts routed expert 5 of layer 2"),
    "super expert rebuilt": (
        (merge(*SINGLES, given_up=(6, 7), method="segments", threshold=0.6),), {"protected": (SUPER,)}, "cuts routed",
    ),
    "super expert slimmed": ((slim(8, form="masked", width=None),), {"protected": (SUPER,)}, "cuts routed expert 5"),
    "shared super expert slimmed": (
        (SlimStep(method="width", form="masked", layers=(SHARED,)),), {"protected": (SUPER_SHARED,)}, "cuts shared",
    ),
    "layer of a super expert": (
        (DropStep(method="x", decoder_layers=(2,)),), {"protected": (SUPER,)}, "cuts routed expert 5 of layer 2"
    ),
    "block of a shared super expert": (
        (DropStep(method="x", blocks=(2,)),), {"protected": (SUPER_SHARED,)}, "cuts shared expert 0 of layer 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_is_taken(name: str) -> None:
    steps, changes = GOOD[name]
    made = plan(*steps, **changes)
    assert made.checked() is made


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(name: str) -> None:
    steps, changes, sentence = BAD[name]
    with pytest.raises(PlanError, match=sentence) as raised:
        plan(*steps, **changes).checked()
    assert "\n" not in str(raised.value)


def test_a_drop_cannot_be_shared() -> None:
    with pytest.raises(ValidationError, match="form"):
        drop(0, form="shared")


def test_models_that_cannot_be_are_refused() -> None:
    shape = {"layer": 1, "num_experts": 8, "top_k": 2, "width": 4}
    for changes, sentence in (
        ({"top_k": 9}, "has 8 experts and uses 9"),
        ({"groups": 3}, "cannot have 3 groups"),
        ({"groups": 2, "chosen_groups": 3}, "chooses 3"),
        ({"num_experts": 10**6}, "less than or equal"),
    ):
        with pytest.raises(ValidationError, match=sentence):
            LayerShape(**{**shape, **changes})
    one = LayerShape(**shape)
    for layers, sentence in (
        ((one, one), "without repetition"),
        ((LayerShape(**{**shape, "layer": 4}),), "layer 4 is not among the 4"),
        (tuple(LayerShape(layer=layer, num_experts=60_000, top_k=1, width=1) for layer in range(20)), "more than"),
    ):
        with pytest.raises(ValidationError, match=sentence):
            source(layers=layers, num_layers=30 if len(layers) > 2 else 4)


def test_several_calls_of_the_experts_are_no_list() -> None:
    layers = tuple(LayerShape(layer=1, step=step, num_experts=4, top_k=1, width=WIDTH) for step in (0, 1))
    entries = tuple(DropLayer(layer=1, step=step, experts=(0,)) for step in (0, 1))
    with pytest.raises(PlanError, match="calls the experts of a layer several times"):
        plan(DropStep(method="reap", layers=entries), layers=layers).checked()
