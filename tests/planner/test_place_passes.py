"""Passes one by one against the sums of scores and counting by hand; the package reached as an attribute; options."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place.methods import Problem, find
from planner.place.passes import passes
from planner.place.score import score
from planner.place.slots import Placement, contiguous
from planner.simulate.workload import Workload, decode
from tests.planner.collected import ROOT


def workload(seed: int = 0) -> Workload:
    """3 layers, 8 experts, 2 of them per token; 9 requests of 3 to 11 tokens."""
    rng = np.random.default_rng(seed)
    ids = np.full((3, 9, 11, 2), -1, np.int16)
    for request in range(9):
        for token in range(int(rng.integers(3, 12))):
            for layer in range(3):
                ids[layer, request, token] = rng.choice(8, 2, replace=False)
    return decode(selections=ids, num_experts=8, domains=["a", "b", "c"] * 3)


PLACED = Placement(np.array([[0, 1, 2, 0, 3, 4, 5, 6, 7, 1, 2, 3]] * 3), 8, 4)


@pytest.mark.parametrize("dispatch", ["local", "fair"])
@pytest.mark.parametrize(("batch", "chunk"), [(1, None), (4, None), (64, None), (64, 3)])
def test_they_add_up_to_the_score(batch: int, chunk: int | None, dispatch: str) -> None:
    work = workload()
    one = passes(work, PLACED, batch=batch, chunk=chunk, dispatch=dispatch)  # type: ignore[arg-type]
    whole = score(work, PLACED, batch=batch, chunk=chunk, dispatch=dispatch)  # type: ignore[arg-type]
    assert one.pairs.sum() == whole.pass_pairs.sum() and one.largest.sum() == whole.pass_largest.sum()
    assert one.tokens.sum() == work.num_passes and one.devices == 4


def test_two_passes_by_hand() -> None:
    ids = np.array([[[[0, 1], [2, 3]], [[0, 2], [-1, -1]]]], np.int16)  # one layer, requests of 2 tokens and of 1
    ids[0, 1, 1] = -1
    work = decode(selections=ids, num_experts=4, domains=["a", "a"])
    found = passes(work, contiguous(num_layers=1, num_experts=4, devices=2), batch=2)
    # The first pass has the pairs 0, 1, 0 on device 0 and 2 on device 1; the second 2 and 3 on device 1.
    assert found.tokens.tolist() == [2, 1] and found.pairs.tolist() == [4, 2] and found.largest.tolist() == [3, 2]
    np.testing.assert_allclose(found.balancedness(), [4 / 2 / 3, 2 / 2 / 2])


def test_the_package_is_an_attribute_of_the_planner() -> None:
    code = (
        "import sys, planner\n"
        "assert 'numpy' not in sys.modules and 'planner.place' not in sys.modules\n"
        "slots = planner.place.eplb(load=[[5, 1, 1, 1]], num_replicas=6, num_groups=1, num_nodes=1, num_gpus=2)\n"
        "assert sorted(slots.physical_to_logical[0].tolist()) == [0, 0, 0, 1, 2, 3], slots\n"
        "assert 'place' in dir(planner)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_options_that_a_method_lacks_or_cannot_read() -> None:
    problem = Problem(load=np.ones((1, 8), np.int64), work=None, devices=2, expert_bytes=1000)
    with pytest.raises(PlanError, match="needs attention and bandwidth: give them as options"):
        find("hecate")(problem)
    with pytest.raises(PlanError, match="needs bandwidth: give it as an option"):
        find("hecate")(problem, attention=1e-4)
    with pytest.raises(PlanError, match="cannot take attention='soon', bandwidth=1: could not convert"):
        find("hecate")(problem, attention="soon", bandwidth=1)
    assert find("hecate").required == ("attention", "bandwidth") and find("eplb").required == ()
