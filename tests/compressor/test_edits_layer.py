"""One layer of a plan: what is stored where, what the router holds, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from compressor.edits.average import average
from compressor.edits.layer import NEVER, LayerEdit, layer_edits
from compressor.edits.moments import LayerMoments
from compressor.edits.slim import mask, slim, widen
from compressor.plan import (
    DropLayer,
    DropStep,
    GivenUp,
    LayerShape,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Plan,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Source,
    Step,
)
from compressor.weights import ExpertWeights
from moescope.errors import PlanError
from tests.compressor.edit_plans import plan
from tests.compressor.test_edits_methods import HIDDEN, WIDTH, close, expert

E = 8
EXPERTS = {number: expert(number, biased=True, dtype=torch.float32) for number in range(E)}
READ = EXPERTS.__getitem__


def made(*steps: Step, **shape: Any) -> Plan:
    """A plan for two layers of 8 experts, with a selection bias."""
    shapes = tuple(LayerShape(layer=layer, num_experts=E, top_k=2, width=WIDTH, **shape) for layer in (1, 2))
    source = Source(
        model="toy",
        model_type="toy",
        hidden_size=HIDDEN,
        expert_size=HIDDEN,
        num_layers=3,
        selection_bias=True,
        layers=shapes,
    )
    return plan(source, *steps)


def merging(*groups: tuple[int, ...], given_up: tuple[int, ...] = (), **step: Any) -> MergeStep:
    """Groups of layer 1, the first member in the lead and the others in the rest; experts not named stay alone."""
    weights = {1: (1.0,), 2: (0.75, 0.25), 3: (0.5, 0.3, 0.2)}
    named = {expert for group in groups for expert in group} | set(given_up)
    groups = (*groups, *((expert,) for expert in range(E) if expert not in named))
    entries = [
        MergeGroup(lead=group[0], members=tuple(sorted(group)), weights=weights[len(group)])
        for group in sorted(groups, key=lambda group: group[0])
    ]
    layer = MergeLayer(
        layer=1, groups=tuple(entries), given_up=tuple(GivenUp(expert=expert, weight=0.1) for expert in given_up)
    )
    return MergeStep(**{"grouping": "test", "method": "average", "form": "per_layer", "layers": (layer,), **step})


def slimming(masks: dict[int, list[int]], form: str = "per_layer", width: int | None = None) -> SlimStep:
    """Neurons that experts of layer 1 keep."""
    kept = []
    for number, neurons in masks.items():
        bits = np.zeros(WIDTH, dtype=bool)
        bits[neurons] = True
        kept.append(SlimExpert.of(expert=number, mask=bits))
    return SlimStep(method="test", form=form, width=width, layers=(SlimLayer(layer=1, experts=tuple(kept)),))  # type: ignore[arg-type]


def test_dropped_experts_close_up() -> None:
    step = DropStep(method="test", form="per_layer", layers=(DropLayer(layer=1, experts=(0, 3)),))
    edit = LayerEdit.of(made(step), (1, 0))
    assert (edit.count, edit.width, edit.changes, edit.same_experts) == (6, WIDTH, True, False)
    assert [edit.untouched(index) for index in range(6)] == [1, 2, 4, 5, 6, 7]
    assert edit.expert(2, READ).up is EXPERTS[4].up
    values = torch.arange(E * 3.0).reshape(E, 3)
    assert torch.equal(edit.rows(values), values[[1, 2, 4, 5, 6, 7]])
    other = LayerEdit.of(made(step), (2, 0))
    assert (other.count, other.changes, other.same_experts) == (E, False, True)


def test_rows_of_experts_without_weights_stay_last() -> None:
    edit = LayerEdit.of(
        made(DropStep(method="test", form="per_layer", layers=(DropLayer(layer=1, experts=(0, 3)),))), (1, 0)
    )
    assert edit.rows(torch.arange(E + 2.0)).tolist() == [1, 2, 4, 5, 6, 7, 8, 9]


def test_merged_experts_have_the_leads_row_or_the_mean() -> None:
    values = torch.randn(E, 4, generator=torch.Generator().manual_seed(0))
    for router in ("lead", "mean"):
        edit = LayerEdit.of(made(merging((2, 0, 5), (4, 7), router=router)), (1, 0))
        assert [slot.lead for slot in edit.experts] == [1, 2, 3, 4, 6]
        assert [edit.untouched(index) for index in range(5)] == [1, None, 3, None, 6]
        close(edit.expert(1, READ), average([(READ(0), 0.5), (READ(2), 0.3), (READ(5), 0.2)]), 1e-6)
        wanted = values[[1, 2, 3, 4, 6]].clone()
        if router == "mean":
            wanted[1] = 0.5 * values[0] + 0.3 * values[2] + 0.2 * values[5]
            wanted[3] = 0.75 * values[4] + 0.25 * values[7]
        torch.testing.assert_close(edit.rows(values), wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(edit.bias(values[:, 0]), wanted[:, 0], rtol=0, atol=1e-6)
        assert edit.expert(1, READ).dtype == torch.float32 and edit.rows(values.bfloat16()).dtype == torch.bfloat16


def test_the_nearest_member_brings_its_own_row() -> None:
    edit = LayerEdit.of(made(merging((2, 0, 5), method="nearest", router="mean")), (1, 0))
    values = torch.arange(float(E))
    with pytest.raises(RuntimeError, match="decide"):
        edit.rows(values)
    edit.decide(READ)
    place = [slot.lead for slot in edit.experts].index(2)
    chosen = edit.untouched(place)
    assert chosen in (0, 2, 5)
    assert edit.rows(values)[place] == chosen and edit.bias(values)[place] == chosen
    assert edit.expert(place, READ).up is EXPERTS[chosen].up


@pytest.mark.parametrize(("groups", "gone", "wanted"), [
    (1, (0, 3, 6), [1, 2, 4, 5, 7, None, None]),
    (2, (0, 5), [1, 2, 3, None, 4, 6, 7, None]),
])  # fmt: skip
def test_fillers_stand_behind_the_experts_of_each_group(
    groups: int, gone: tuple[int, ...], wanted: list[int | None]
) -> None:
    other = (0,) if groups == 1 else ()
    layers = (DropLayer(layer=1, experts=gone), DropLayer(layer=2, experts=other))
    step = DropStep(method="test", form="padded", layers=layers)
    edit = LayerEdit.of(made(step, groups=groups, chosen_groups=1), (1, 0))
    assert [slot.lead if slot else None for slot in edit.slots] == wanted
    assert [edit.untouched(index) for index in range(edit.count)] == wanted
    filler = wanted.index(None)
    assert not any(tensor.any() for _, tensor in edit.expert(filler, READ).parts())
    bias, rows = edit.bias(torch.ones(E)), edit.rows(torch.ones(E, 3))
    assert [float(value) for value in bias] == [NEVER if lead is None else 1.0 for lead in wanted]
    assert [bool(row.any()) for row in rows] == [lead is not None for lead in wanted]
    assert torch.isfinite(edit.bias(torch.ones(E, dtype=torch.float16))).all()


def test_slimmed_experts_are_padded_to_the_widest() -> None:
    edit = LayerEdit.of(made(slimming({number: [0, 2, 3][: 2 + number % 2] for number in range(E)})), (1, 0))
    assert edit.width == 3 and edit.untouched(0) is None and edit.same_experts
    kept = torch.tensor([True, False, True, False, False])
    close(edit.expert(0, READ), widen(slim(EXPERTS[0], kept), 3), 0)
    masked = LayerEdit.of(made(slimming({0: [0, 2]}, "masked")), (1, 0))
    assert masked.width == WIDTH and masked.untouched(0) is None and masked.untouched(1) == 1
    close(masked.expert(0, READ), mask(EXPERTS[0], kept), 0)


def test_the_leads_mask_cuts_what_was_merged() -> None:
    slims = slimming({number: [0, 2] if number == 2 else [1, 3] for number in range(E)}, "uniform", 2)
    layer_two = SlimLayer(layer=2, experts=slims.layers[0].experts)
    slims = slims.model_copy(update={"layers": (*slims.layers, layer_two)})
    edit = LayerEdit.of(made(merging((2, 0, 5)), slims), (1, 0))
    merged = average([(READ(0), 0.5), (READ(2), 0.3), (READ(5), 0.2)])
    close(edit.expert(1, READ), slim(merged, torch.tensor([True, False, True, False, False])), 1e-6)


def test_a_dropped_block_puts_out_nothing() -> None:
    edits = layer_edits(made(DropStep(method="test", blocks=(1,)), shared_width=WIDTH))
    edit = edits[1, 0]
    assert edit.zero_output and edit.same_experts and edit.untouched(0) is None and not edits[2, 0].changes
    for found in (edit.expert(3, READ), edit.shared(EXPERTS[3])):
        assert found.down_bias is not None and not found.down.any() and not found.down_bias.any() and found.up.any()


def test_shared_experts_are_cut_by_a_mask_of_their_own() -> None:
    bits = np.array([True, True, False, True, False])
    layer = SlimLayer(layer=1, experts=(SlimExpert.of(expert=0, role="shared", mask=bits),))
    for form, width in (("per_layer", 3), ("masked", WIDTH)):
        edit = LayerEdit.of(made(SlimStep(method="test", form=form, layers=(layer,)), shared_width=WIDTH), (1, 0))  # type: ignore[arg-type]
        cut = slim if form == "per_layer" else mask
        assert edit.shared_width == width and edit.width == WIDTH and edit.untouched(0) == 0
        close(edit.shared(EXPERTS[0]), cut(EXPERTS[0], torch.from_numpy(bits)), 0)


def test_segments_leave_experts_alone_that_receive_nothing() -> None:
    near = EXPERTS[4].map(lambda tensor: 1.1 * tensor)
    experts = {**EXPERTS, 7: near}
    reads: list[int] = []

    def read(number: int) -> ExpertWeights:
        reads.append(number)
        return experts[number]

    edit = LayerEdit.of(made(merging(given_up=(3, 7), method="segments", threshold=0.99)), (1, 0))
    with pytest.raises(RuntimeError, match="decide"):
        edit.untouched(0)
    edit.decide(read)
    assert [edit.untouched(index) for index in range(6)] == [0, 1, 2, None, 5, 6]
    assert edit.expert(0, read).up is experts[0].up
    count = len(reads)
    edit.decide(read)
    assert len(reads) == count  # assignments are worked out once
    # Equal directions: the own neurons stay, a little louder.
    norms = edit.expert(3, read).up.norm(dim=1) / EXPERTS[4].up.norm(dim=1)
    assert bool(((norms > 1.0) & (norms < 1.1)).all())


def test_fixed_experts_receive_nothing() -> None:
    step = merging(given_up=(7,), method="segments", threshold=0.99)
    groups = tuple(group.model_copy(update={"fixed": group.lead == 4}) for group in step.layers[0].groups)
    layer = step.layers[0].model_copy(update={"groups": groups})
    edit = LayerEdit.of(made(step.model_copy(update={"layers": (layer,)})), (1, 0))
    experts = {**EXPERTS, 7: EXPERTS[4].map(torch.clone)}
    edit.decide(experts.__getitem__)
    assert [edit.untouched(index) for index in range(7)] == list(range(7))


def test_what_lacks_its_means_is_refused() -> None:
    step = merging((2, 0), method="subspace", rank=2)
    with pytest.raises(PlanError, match="second moments"):
        LayerEdit.of(made(step), (1, 0))
    known = LayerMoments(torch.eye(HIDDEN), torch.ones(E, WIDTH))
    assert LayerEdit.of(made(step), (1, 0), known).expert(0, READ).up.shape == (WIDTH, HIDDEN)
    with pytest.raises(PlanError, match="rank"):
        LayerEdit.of(made(step.model_copy(update={"rank": None})), (1, 0), known)
    with pytest.raises(PlanError, match="no groups of several"):
        LayerEdit.of(made(merging((2, 0), given_up=(7,), method="segments", threshold=0.6)), (1, 0))
    with pytest.raises(PlanError, match="no MoE layer 0"):
        LayerEdit.of(made(step), (0, 0), known)
