"""EPLB against the published code's answers, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner.place
from moescope.errors import PlanError
from planner.place.slots import Placement
from tests.planner.collected import ROOT


def _reference(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "tests" / "reference" / f"eplb-{name}.json").read_text())
    return content


def test_the_example_of_its_readme() -> None:
    load = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    found = planner.place.eplb(load=load, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert found.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_the_hierarchical_reference() -> None:
    known = _reference("12x16")
    found = planner.place.eplb(load=known["weight"], **known["args"])
    np.testing.assert_array_equal(found.physical_to_logical, known["physical_to_logical"])
    np.testing.assert_array_equal(found.logical_count, known["logical_count"])


def test_the_global_reference_up_to_experts_that_weigh_the_same() -> None:
    # Layers 2 and 3 hold two experts of 20 and of 41 tokens; the published code's sort puts them either way round.
    known = _reference("64x72")
    found = planner.place.eplb(load=known["weight"], **known["args"])
    weight, expected = np.array(known["weight"], float), np.array(known["physical_to_logical"])
    np.testing.assert_array_equal(found.logical_count, known["logical_count"])
    each = weight / found.logical_count
    ours = np.take_along_axis(each, found.physical_to_logical, 1)
    np.testing.assert_array_equal(ours, np.take_along_axis(each, expected, 1))
    differs = found.physical_to_logical != expected
    assert differs.sum() == 4 and set(ours[differs]) == {20.0, 41.0}


@pytest.mark.parametrize("name", ["12x16", "64x72"])
def test_balancedness_of_the_reference(name: str) -> None:
    known = _reference(name)
    args = known["args"]
    slots = planner.place.eplb(load=known["weight"], **args).physical_to_logical
    placed = Placement(slots, slots.max() + 1, args["num_gpus"], args["num_nodes"])
    load = placed.load(np.array(known["weight"]))
    np.testing.assert_allclose(load.mean(-1) / load.max(-1), known["balancedness_per_layer"], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_replicas_and_nodes_hold_what_they_must(data: st.DataObject) -> None:
    nodes, per_node, groups_per_node, size = (data.draw(st.integers(1, 3), label=name) for name in "nags")
    gpus, groups = nodes * per_node, nodes * groups_per_node
    experts = groups * size
    replicas = -(-experts // gpus) * gpus + gpus * data.draw(st.integers(0, 2))
    load = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 50, (3, experts))
    found = planner.place.eplb(load=load, num_replicas=replicas, num_groups=groups, num_nodes=nodes, num_gpus=gpus)
    for layer in range(3):
        slots, table = found.physical_to_logical[layer], found.logical_to_physical[layer]
        assert np.bincount(slots, minlength=experts).tolist() == found.logical_count[layer].tolist()
        assert found.logical_count[layer].min() >= 1
        for expert in range(experts):
            mine = table[expert][table[expert] >= 0]
            assert sorted(mine) == np.flatnonzero(slots == expert).tolist()
            assert (table[expert][len(mine) :] == -1).all()
        of_node = slots.reshape(nodes, -1) // size
        homes = [set(row) for row in of_node]
        assert all(not one & other for at, one in enumerate(homes) for other in homes[:at])  # a group has one node


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 32}, r"32 devices are more than the 16 slots of a layer: use at most 16"),
        ({"num_gpus": 6}, r"16 slots cannot be divided among 6 devices: 12 or 18 slots would do.*4 or 8 devices"),
        ({"num_replicas": 10}, r"10 slots cannot hold 12 experts: give 16 or more"),
        ({"num_groups": 8}, r"12 experts cannot be divided into 8 groups: 6 or 12 groups would do"),
        ({"num_groups": 3, "num_nodes": 3}, r"8 devices cannot be divided among 3 nodes: 2 or 4 nodes would do"),
        ({"load": [[1, -2]]}, r"load holds -2.0: give counts"),
        ({"load": [1, 2]}, r"load of shape \(2,\)"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_do(changes: dict[str, Any], message: str) -> None:
    known: dict[str, Any] = {"load": np.ones((1, 12)), "num_replicas": 16, "num_groups": 4, "num_nodes": 2}
    with pytest.raises(PlanError, match=message):
        planner.place.eplb(**{**known, "num_gpus": 8, **changes})


def test_indivisible_groups_mean_the_global_policy() -> None:
    load = np.arange(24).reshape(2, 12)
    found = planner.place.eplb(load=load, num_replicas=16, num_groups=3, num_nodes=2, num_gpus=8)
    same = planner.place.eplb(load=load, num_replicas=16, num_groups=1, num_nodes=1, num_gpus=8)
    np.testing.assert_array_equal(found.physical_to_logical, same.physical_to_logical)


def test_the_package_loads_no_numpy_until_it_is_asked() -> None:
    code = "import sys, planner.place; assert 'numpy' not in sys.modules; assert callable(planner.place.eplb)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
