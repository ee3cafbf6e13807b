"""Factored experts against singular values, plain loops, and copies; in memory, in checkpoints, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.apply import apply
from compressor.edits.factor import largest, low_rank_sparse, ternary
from compressor.edits.layer import LayerEdit
from compressor.memory import edited
from compressor.plan import (
    DropLayer,
    DropStep,
    FactorGroup,
    FactorLayer,
    FactorStep,
    Plan,
    Protected,
    differences,
)
from compressor.weights import ExpertWeights
from moescope.errors import PlanError
from tests.compressor import planned
from tests.compressor.apply_cases import assert_same_output, reload, saved, source_of, tensors
from tests.compressor.edit_plans import plan
from tests.compressor.edited_models import Snapshot, merging, near, run
from tests.compressor.test_edits_layer import EXPERTS, READ, E, made
from tests.compressor.test_edits_layer import merging as merging_of
from tests.compressor.test_edits_layer import slimming as slimming_of
from tests.compressor.test_edits_methods import HIDDEN, WIDTH, close, output, permuted
from tests.profiler.capture.tiny import build


def singles(*experts: int) -> tuple[FactorGroup, ...]:
    """Groups of one."""
    return tuple(FactorGroup(lead=one, members=(one,), weights=(1.0,)) for one in experts)


def low_rank(*experts: int, layer: int = 1, **changes: Any) -> FactorStep:
    """Rank 2, half of the rows."""
    layers = (FactorLayer(layer=layer, groups=singles(*experts)),)
    known = {"grouping": "test", "method": "low_rank_sparse", "rank": 2, "density": 0.5, "layers": layers}
    return FactorStep(**{**known, **changes})


def residual(*groups: FactorGroup, layer: int = 1, **changes: Any) -> FactorStep:
    """Residuals of the given groups."""
    known = {"grouping": "test", "method": "ternary_residual", "scale": 1.5, "density": 0.3,
             "layers": (FactorLayer(layer=layer, groups=groups),)}  # fmt: skip
    return FactorStep(**{**known, **changes})


TRIO = FactorGroup(lead=4, members=(1, 4, 6), weights=(0.2, 0.5, 0.3))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(7, 12), (12, 7)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_without_rows_the_error_is_that_of_the_singular_values_left_out(rows: int, columns: int, rank: int) -> None:
    weight = normal(rows, columns)
    found = low_rank_sparse(weight, rank, 0.0)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert np.linalg.norm((weight - found).numpy()) == pytest.approx(np.sqrt((values[rank:] ** 2).sum()), abs=1e-12)
    assert np.linalg.matrix_rank(found.numpy(), tol=1e-10) == rank


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_the_rows_that_are_missed_most_are_exact(density: float) -> None:
    weight = normal(10, 8)
    product, found = low_rank_sparse(weight, 2, 0.0), low_rank_sparse(weight, 2, density)
    missed = np.linalg.norm((weight - product).numpy(), axis=1)
    kept = sorted(np.argsort(-missed)[: round(10 * density)].tolist())
    exact = [row for row in range(10) if torch.equal(found[row], weight[row])]
    assert exact == kept
    others = [row for row in range(10) if row not in kept]
    assert torch.equal(found[others], product[others])
    error = float((weight - found).square().sum())
    assert error == pytest.approx(sum(missed[row] ** 2 for row in others), abs=1e-12)


@pytest.mark.parametrize(("density", "scale"), [(0.0, 1.0), (0.2, 1.0), (0.5, 3.0), (1.0, 0.5)])
def test_residuals_are_compefts_formula(density: float, scale: float) -> None:
    tau = normal(9, 5).numpy()
    tau[2, 3] = 0.0
    flat = tau.ravel()
    chosen = sorted(range(flat.size), key=lambda place: -abs(flat[place]))[: round(density * flat.size)]
    spread = np.sqrt(((flat - flat.mean()) ** 2).mean())
    wanted = np.zeros_like(flat)
    for place in chosen:
        wanted[place] = scale * spread * np.sign(flat[place])
    found = ternary(torch.from_numpy(tau), density=density, scale=scale)
    np.testing.assert_allclose(found.numpy().ravel(), wanted, rtol=0, atol=1e-12)


def test_of_equal_values_the_first_are_taken() -> None:
    values = torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0])
    counts = {count: largest(values, count).nonzero().ravel().tolist() for count in range(6)}
    assert counts == {0: [], 1: [2], 2: [0, 2], 3: [0, 2, 3], 4: [0, 2, 3, 4], 5: [0, 1, 2, 3, 4]}


def test_every_matrix_of_an_expert_is_factored_and_biases_stay() -> None:
    edit = LayerEdit.of(made(low_rank(0, 3)), (1, 0))
    assert edit.changes and [edit.untouched(index) for index in range(4)] == [None, 1, 2, None]
    found, own = edit.expert(3, READ), EXPERTS[3]
    for part in ("gate", "up", "down"):
        matrix = getattr(own, part)
        wanted = low_rank_sparse(matrix.double(), 2, 0.5).float()
        assert torch.equal(getattr(found, part), wanted) and not torch.equal(wanted, matrix)
    for part in ("gate_bias", "up_bias", "down_bias"):
        assert torch.equal(getattr(found, part), getattr(own, part))
    assert found.dtype == torch.float32
    other = LayerEdit.of(made(low_rank(0, 3)), (2, 0))
    assert not other.changes and other.untouched(0) == 0


def _best_order(lead: ExpertWeights, other: ExpertWeights) -> list[int]:
    """By trying all orders."""

    def distance(order: tuple[int, ...]) -> float:
        moved = permuted(other, list(order)).exact()
        reference = dict(lead.exact().parts())
        return sum(float((reference[name] - part).square().sum()) for name, part in moved.parts())

    return list(min(itertools.permutations(range(WIDTH)), key=distance))


def test_members_are_the_centre_and_a_residual() -> None:
    edit = LayerEdit.of(made(residual(TRIO, *singles(0, 2))), (1, 0))
    assert [edit.untouched(index) for index in range(E)] == [0, None, 2, 3, None, 5, None, 7]
    members = {
        number: permuted(EXPERTS[number], _best_order(EXPERTS[4], EXPERTS[number]) if number != 4 else [*range(WIDTH)])
        for number in TRIO.members
    }
    for part in ("gate", "up", "down"):
        own = {number: getattr(weights, part).double() for number, weights in members.items()}
        centre = 0.2 * own[1] + 0.5 * own[4] + 0.3 * own[6]
        for number in TRIO.members:
            wanted = centre + ternary(own[number] - centre, density=0.3, scale=1.5)
            torch.testing.assert_close(getattr(edit.expert(number, READ), part).double(), wanted, rtol=0, atol=1e-6)
    for part in ("gate_bias", "up_bias", "down_bias"):
        assert torch.equal(getattr(edit.expert(6, READ), part), getattr(members[6], part))


def test_members_of_several_groups_are_read_in_any_order() -> None:
    pair = FactorGroup(lead=5, members=(3, 5), weights=(0.5, 0.5))
    together = LayerEdit.of(made(residual(TRIO, pair)), (1, 0))
    for number in (1, 3, 4, 5, 6, 3, 1):
        group = TRIO if number in TRIO.members else pair
        alone = LayerEdit.of(made(residual(group)), (1, 0))
        close(together.expert(number, READ), alone.expert(number, READ), 0)


def test_copies_whose_neurons_stand_otherwise_compute_what_they_did() -> None:
    own = EXPERTS[4].exact()
    experts = {**EXPERTS, 1: permuted(own, [3, 0, 4, 1, 2]), 4: own, 6: permuted(own, [4, 3, 2, 1, 0])}
    edit = LayerEdit.of(made(residual(TRIO)), (1, 0))
    inputs = normal(20, HIDDEN, seed=7)
    for number in TRIO.members:
        found = edit.expert(number, experts.__getitem__)
        torch.testing.assert_close(output(found, inputs), output(experts[number], inputs), rtol=0, atol=1e-12)
        close(found, own, 1e-12)


def test_what_is_merged_is_factored() -> None:
    groups = merging_of((2, 0, 5))
    edit = LayerEdit.of(made(groups, low_rank(1, 2)), (1, 0))
    before = LayerEdit.of(made(groups), (1, 0))
    assert [edit.untouched(index) for index in range(5)] == [None, None, 3, 4, 6]
    merged = before.expert(1, READ)
    wanted = merged.map(lambda tensor: tensor if tensor.ndim == 1 else low_rank_sparse(tensor.double(), 2, 0.5).float())
    close(edit.expert(1, READ), wanted, 1e-6)


def _plan_of(model: nn.Module, method: str) -> Plan:
    known = source_of(model)
    pair = FactorGroup(lead=2, members=(0, 2, 3), weights=(0.25, 0.5, 0.25))
    groups = singles(1, 2) if method == "low_rank_sparse" else (pair,)
    layers = tuple(FactorLayer(layer=shape.layer, groups=groups) for shape in known.layers)
    make = low_rank if method == "low_rank_sparse" else residual
    return plan(known, make(layers=layers))


def _by_hand(model: Any) -> None:
    """OLMoE's experts 1 and 2, in place."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        width = experts.down_proj.shape[2]
        with torch.no_grad():
            for number in (1, 2):
                for matrix in (experts.gate_up_proj[number, :width], experts.gate_up_proj[number, width:],
                               experts.down_proj[number]):  # fmt: skip
                    matrix.copy_(low_rank_sparse(matrix.double(), 2, 0.5))


def test_a_model_in_memory_and_back() -> None:
    model, twin = build("olmoe"), build("olmoe")
    _by_hand(twin)
    wanted, before, snapshot = run(twin), run(model), Snapshot(model)
    with edited(model, _plan_of(model, "low_rank_sparse")):
        near(run(model), wanted)
    snapshot.require_same(model)
    assert torch.equal(run(model), before) and not torch.allclose(wanted, before, rtol=1e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
@pytest.mark.parametrize("method", ["low_rank_sparse", "ternary_residual"])
def test_checkpoints_are_the_edit_in_memory(family: str, method: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "before", shard="40KB")
    wanted = _plan_of(model, method)
    receipt = apply(wanted, source=tmp_path / "before", destination=tmp_path / "after")
    assert receipt.loads_with == "transformers" and receipt.tensors_edited
    found = reload(family, tmp_path / "after")
    before, after = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    assert {name: value.shape for name, value in before.items()} == {name: one.shape for name, one in after.items()}
    with edited(model, wanted):
        assert_same_output(found, model)


def test_a_merge_and_factors_in_one_checkpoint(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "before")
    merge = merging(source_of(model), [(1, 4), (0, 6)])
    layers = tuple(FactorLayer(layer=shape.layer, groups=singles(0, 1, 2)) for shape in merge.source.layers)
    wanted = plan(merge.source, *merge.steps, low_rank(layers=layers))
    apply(wanted, source=tmp_path / "before", destination=tmp_path / "after")
    found = reload("olmoe", tmp_path / "after")
    with edited(model, wanted):
        assert_same_output(found, model)


SUPER = Protected(layer=1, expert=3, reason="super expert")
DROP = DropStep(method="test", form="per_layer", layers=(DropLayer(layer=1, experts=(5,)),))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((DROP, low_rank(5)), "factors expert 5 of layer 1, which does not stay"),
        ((low_rank(2, 2),), "expert 2 of layer 1 stands in two groups"),
        ((low_rank(2, layers=(FactorLayer(layer=1, groups=()),) * 2),), "names layer 1 twice"),
        ((low_rank(2, rank=12),), "rank 12 is no less than that of the experts of layer 1, 12: use at most 11"),
        ((low_rank(layers=(FactorLayer(layer=1, groups=(TRIO,)),)),), "takes experts one by one"),
        ((low_rank(3),), "factors routed expert 3 of layer 1, which it protects: super expert"),
        ((residual(FactorGroup(lead=3, members=(3, 4), weights=(0.5, 0.5))),), "expert 3 of layer 1, which it"),
        ((residual(FactorGroup(lead=2, members=(4, 5), weights=(0.5, 0.5))),), "lacks its lead or a weight"),
        ((residual(FactorGroup(lead=4, members=(4, 5), weights=(0.5, 0.6))),), "sum to 1.1, not to 1"),
        ((low_rank(9),), "names expert 9 of layer 1, which has experts 0..7"),
        ((low_rank(2), low_rank(4)), "two factor steps"),
        ((low_rank(2), DROP), "cut first, then factor"),
    ],
)
def test_what_cannot_be_factored_is_refused(steps: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        planned.plan(*steps, protected=(SUPER,)).checked()


def test_a_protected_expert_may_stand_alone() -> None:
    planned.plan(residual(*singles(3), TRIO), protected=(SUPER,)).checked()


def test_slimmed_experts_share_no_centre() -> None:
    slims = slimming_of({number: [0, 1, 2] for number in range(E)}, "masked")
    made(slims, low_rank(1, rank=2))
    with pytest.raises(PlanError, match="which the centre of group 4 would bring back"):
        made(slims, residual(TRIO))


def test_the_difference_of_plans_names_factors() -> None:
    first, second = planned.plan(low_rank(2)), planned.plan(residual(TRIO))
    found = {(one.expert, one.first, one.second) for one in differences(first, second)}
    assert found == {(2, "rank 2", "kept"), *((member, "kept", "residual of 4") for member in TRIO.members)}


def test_where_nothing_differs_nothing_is_added() -> None:
    nothing = torch.zeros(4, 3)
    assert torch.equal(ternary(nothing, density=1.0, scale=2.0), nothing)
