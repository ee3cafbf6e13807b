"""What a plan leaves, unit by unit, and how two plans differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.plan import DropStep, SlimExpert, SlimLayer, SlimStep, differences, experts_after, kept_layers
from compressor.plan.result import neurons_after, widths_after
from moescope.errors import PlanError
from tests.compressor.planned import EXPERTS, WIDTH, plan
from tests.compressor.test_plan_rules import PAIRS, SHARED, drop, group, merge, slim


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_masks_come_back(bits: list[bool]) -> None:
    mask = np.array(bits)
    entry = SlimExpert.of(expert=0, mask=mask)
    assert np.array_equal(entry.mask(len(bits)), mask)
    with pytest.raises(ValueError, match="are not"):
        entry.mask(len(bits) + 8)


def test_experts_after_a_drop_keep_their_numbers() -> None:
    after = experts_after(plan(drop(0, 3)))
    assert [one.lead for one in after[2, 0]] == [1, 2, 4, 5, 6, 7]
    assert all(one.members == (one.lead,) and one.weights == (1.0,) and not one.merged for one in after[2, 0])


def test_experts_after_a_merge_stand_by_their_lead() -> None:
    groups = (group(5, 0, 1, lead=5, members=(0, 1, 5)), *(group(one) for one in (2, 3, 4, 6, 7)))
    after = experts_after(plan(merge(*groups)))[1, 0]
    assert [one.lead for one in after] == [2, 3, 4, 5, 6, 7]
    assert after[3].members == (0, 1, 5) and after[3].merged


def test_decoder_layers_move_up() -> None:
    made = plan(DropStep(method="block_influence", decoder_layers=(0, 2)))
    assert kept_layers(made) == [1, 3]
    assert sorted(experts_after(made)) == [(1, 0), (3, 0)]


def test_masks_and_widths() -> None:
    made = plan(slim(5, experts=range(2), layers=(2,), form="per_layer", width=None))
    masks = neurons_after(made)
    assert sorted(masks) == [(2, 0, 0, "routed"), (2, 0, 1, "routed")]
    assert masks[2, 0, 0, "routed"].sum() == 5
    assert widths_after(made) == {(1, 0): WIDTH, (2, 0): WIDTH, (3, 0): WIDTH}  # six experts keep all
    whole = plan(slim(5, layers=(2,), form="per_layer", width=None))
    assert widths_after(whole)[2, 0] == 5 and widths_after(whole)[1, 0] == WIDTH
    assert set(widths_after(plan(slim(5))).values()) == {5}
    assert set(widths_after(plan(slim(5, form="masked", width=None))).values()) == {WIDTH}


def test_differences_name_every_unit_that_differs() -> None:
    first, second = plan(drop(0, 3)), plan(merge(*PAIRS))
    found = {(one.layer, one.expert): (one.first, one.second) for one in differences(first, second)}
    assert len(found) == 3 * EXPERTS
    assert found[1, 0] == ("dropped", "merged into 0")
    assert found[1, 1] == ("kept", "merged into 0")
    assert differences(first, first) == []


def test_differences_of_neurons_and_layers() -> None:
    first = plan(SlimStep(method="width", form="masked", layers=(SHARED,)))
    second = plan(DropStep(method="block_influence", decoder_layers=(3,)))
    found = [(one.layer, one.expert, one.role, one.first, one.second) for one in differences(first, second)]
    assert (2, 0, "shared", "3 of 6 neurons", "kept") in found
    assert (3, -1, "layer", "kept", "dropped") in found
    assert all(one[2] != "routed" or one[0] == 3 for one in found)


def test_a_dropped_expert_has_no_neurons_to_compare() -> None:
    mask = np.arange(WIDTH) < 4
    step = SlimStep(
        method="width", form="masked", layers=(SlimLayer(layer=1, experts=(SlimExpert.of(expert=0, mask=mask),)),)
    )
    found = [(one.expert, one.first, one.second) for one in differences(plan(drop(0), step), plan(drop(0)))]
    assert found == []


def test_plans_of_other_models_do_not_compare() -> None:
    with pytest.raises(PlanError, match="models of different shape: toy and toy"):
        differences(plan(drop(0)), plan(drop(0), num_layers=5))
