"""Each method of merging against an independent formulation, in float64 where the claim is an identity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.edits.aligned import aligned, matching
from compressor.edits.average import average
from compressor.edits.moments import LayerMoments
from compressor.edits.nearest import nearest
from compressor.edits.silence import silenced
from compressor.edits.slim import mask, slim, widen
from compressor.edits.subspace import subspace
from compressor.weights import ExpertWeights

HIDDEN, WIDTH = 6, 5


def expert(seed: int, *, gated: bool = True, biased: bool = False, dtype: torch.dtype = torch.float64) -> ExpertWeights:
    """Random weights."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    return ExpertWeights(
        up=normal(WIDTH, HIDDEN),
        down=normal(HIDDEN, WIDTH),
        gate=normal(WIDTH, HIDDEN) if gated else None,
        up_bias=normal(WIDTH) if biased else None,
        gate_bias=normal(WIDTH) if biased and gated else None,
        down_bias=normal(HIDDEN) if biased else None,
    )


def output(weights: ExpertWeights, inputs: Tensor) -> Tensor:
    """What an expert puts out."""
    up = inputs @ weights.up.T + (0 if weights.up_bias is None else weights.up_bias)
    if weights.gate is not None:
        gate = inputs @ weights.gate.T + (0 if weights.gate_bias is None else weights.gate_bias)
        up = torch.nn.functional.silu(gate) * up
    else:
        up = torch.relu(up) ** 2
    return up @ weights.down.T + (0 if weights.down_bias is None else weights.down_bias)


def flattened(weights: ExpertWeights) -> np.ndarray:
    """All of an expert in one vector."""
    return np.concatenate([tensor.double().numpy().ravel() for _, tensor in weights.parts()])


def permuted(weights: ExpertWeights, order: list[int]) -> ExpertWeights:
    """The same expert with its neurons in another order, written out for every part."""
    index = torch.tensor(order)
    return ExpertWeights(
        up=weights.up.index_select(0, index),
        down=weights.down.index_select(1, index),
        gate=weights.gate.index_select(0, index) if weights.gate is not None else None,
        up_bias=weights.up_bias.index_select(0, index) if weights.up_bias is not None else None,
        gate_bias=weights.gate_bias.index_select(0, index) if weights.gate_bias is not None else None,
        down_bias=weights.down_bias,
    )


def close(one: ExpertWeights, two: ExpertWeights, tolerance: float) -> None:
    """All parts agree."""
    first, second = dict(one.parts()), dict(two.parts())
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor.double(), second[name].double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("gated", "biased"), [(True, True), (True, False), (False, True)])
def test_average_is_the_weighted_sum_of_everything(gated: bool, biased: bool) -> None:
    members = [expert(seed, gated=gated, biased=biased) for seed in range(3)]
    parts = [0.2, 0.5, 0.3]
    found = average(zip(members, parts, strict=True))
    wanted = sum(part * flattened(member) for part, member in zip(parts, members, strict=True))
    np.testing.assert_allclose(flattened(found), wanted, rtol=0, atol=1e-14)
    np.testing.assert_allclose(
        flattened(average((m, 7 * p) for m, p in zip(members, parts, strict=True))), wanted, atol=1e-14
    )


def test_average_leaves_its_members_alone_and_refuses_no_weight() -> None:
    member = expert(0)
    before = flattened(member)
    average([(member, 0.5), (expert(1), 0.5)])
    np.testing.assert_array_equal(flattened(member), before)
    with pytest.raises(ValueError, match="sum to 0"):
        average([(member, 0.0)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["average", "aligned"])
def test_copies_merge_to_themselves(dtype: torch.dtype, method: str) -> None:
    one = expert(3, biased=True, dtype=dtype)
    members = [(one, 0.1), (one.map(torch.clone), 0.7), (one.map(torch.clone), 0.2)]
    found = (average(members) if method == "average" else aligned(one, members)).like(one)
    for name, tensor in found.parts():
        # The mean is taken in a wider type; rounding back gives the copy itself.
        assert torch.equal(tensor, getattr(one, name)), name


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, False)])
def test_a_planted_permutation_is_found(gated: bool, biased: bool) -> None:
    lead = expert(1, gated=gated, biased=biased)
    order = [3, 0, 4, 1, 2]
    other = permuted(lead, order)
    torch.testing.assert_close(torch.tensor(order)[matching(lead, other)], torch.arange(WIDTH))
    close(aligned(lead, [(lead, 0.4), (other, 0.6)]), lead, 1e-14)
    assert np.abs(flattened(average([(lead, 0.4), (other, 0.6)])) - flattened(lead)).max() > 0.1


def test_the_assignment_is_the_best_of_all() -> None:
    lead, other = expert(1, biased=True), expert(2, biased=True)
    distances = {
        order: float(((flattened(lead) - flattened(permuted(other, list(order)))) ** 2).sum())
        for order in itertools.permutations(range(WIDTH))
    }
    best = min(distances, key=distances.__getitem__)
    assert tuple(matching(lead, other).tolist()) == best
    wanted = average([(lead, 0.5), (permuted(other, list(best)), 0.5)])
    close(aligned(lead, [(lead, 0.5), (other, 0.5)]), wanted, 1e-14)


def test_nearest_is_the_member_with_the_least_distance() -> None:
    members = {number: expert(number, biased=True) for number in (2, 5, 7, 11)}
    parts = [0.1, 0.2, 0.65, 0.05]
    mean = sum(part * flattened(member) for part, member in zip(parts, members.values(), strict=True))
    distances = {number: np.linalg.norm(flattened(member) - mean) for number, member in members.items()}
    wanted = min(distances, key=distances.__getitem__)
    assert nearest(11, list(members), parts, members.__getitem__) == wanted
    equal = [0.25] * 4
    mean = sum(flattened(member) for member in members.values()) / 4
    distances = {number: np.linalg.norm(flattened(member) - mean) for number, member in members.items()}
    assert nearest(11, list(members), equal, members.__getitem__) == min(distances, key=distances.__getitem__)
    for lead in (2, 5):  # both are equally near
        assert nearest(lead, [2, 5], [0.5, 0.5], members.__getitem__) == lead


def moments(count: int, seed: int = 0) -> LayerMoments:
    """Of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, HIDDEN, generator=draw, dtype=torch.float64) * torch.arange(1, HIDDEN + 1)
    return LayerMoments(inputs.T @ inputs, torch.rand(count, WIDTH, generator=draw, dtype=torch.float64) + 0.1)


def test_subspace_at_full_rank_is_the_mean() -> None:
    members = {number: expert(number, biased=True) for number in (0, 2, 3)}
    parts = [0.5, 0.3, 0.2]
    close(subspace(members, parts, HIDDEN, moments(4)), average(zip(members.values(), parts, strict=True)), 1e-14)


def test_joint_decomposition_without_truncation_is_the_mean() -> None:
    # Sub-MoE: [W_1 .. W_n] = U S [V_1 .. V_n]', merged = U S sum(a_i V_i').
    matrices = [expert(number).up.numpy() for number in range(3)]
    parts = [0.5, 0.3, 0.2]
    left, values, right = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    merged = (left * values) @ sum(part * piece for part, piece in zip(parts, np.split(right, 3, axis=1), strict=True))
    wanted = average((expert(number), part) for number, part in enumerate(parts)).up.numpy()
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_subspace_is_the_whitened_and_truncated_decomposition(rank: int) -> None:
    members = {number: expert(number) for number in (0, 2, 3)}
    parts, known = [0.5, 0.3, 0.2], moments(4)
    found = subspace(members, parts, rank, known)
    white = [np.linalg.cholesky(known.input.numpy())] * 3
    diagonal = [np.diag(np.sqrt(known.activation_square[number].numpy())) for number in members]
    for name, roots in (("up", white), ("gate", white), ("down", diagonal)):
        matrices = [getattr(member, name).numpy() for member in members.values()]
        wanted = whitened_merge(matrices, roots, parts, rank)
        np.testing.assert_allclose(getattr(found, name).numpy(), wanted, rtol=0, atol=1e-10)
        assert np.linalg.matrix_rank(getattr(found, name).numpy()) == rank


def whitened_merge(matrices: list[np.ndarray], roots: list[np.ndarray], parts: list[float], rank: int) -> np.ndarray:
    """Sub-MoE's truncated merge, step by step: whiten, decompose together, cut, average, undo."""
    whitened = [matrix @ root for matrix, root in zip(matrices, roots, strict=True)]
    left, values, right = np.linalg.svd(np.concatenate(whitened, axis=1), full_matrices=False)
    pieces = np.split(right[:rank], len(matrices), axis=1)
    undone = [piece @ np.linalg.inv(root) for piece, root in zip(pieces, roots, strict=True)]
    return (left[:, :rank] * values[:rank]) @ sum(part * piece for part, piece in zip(parts, undone, strict=True))


def test_a_subspace_keeps_the_outputs_that_matter_most() -> None:
    members = {0: expert(0), 1: expert(1)}
    known, parts = moments(2), [0.5, 0.5]
    mean = average(zip(members.values(), parts, strict=True)).up
    lost = []
    for rank in (1, 2, 3, 4):
        error = subspace(members, parts, rank, known).up - mean
        lost.append(float(torch.trace(error @ known.input @ error.T)))
    assert lost == sorted(lost, reverse=True) and lost[-1] > 0


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, False)])
def test_slim_widen_and_mask_put_out_the_same(gated: bool, biased: bool) -> None:
    whole = expert(4, gated=gated, biased=biased)
    inputs = torch.randn(20, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    kept = torch.tensor([True, False, True, True, False])
    zeroed = whole.map(torch.clone)
    zeroed.down[:, ~kept] = 0
    wanted = output(zeroed, inputs)
    narrow = slim(whole, kept)
    assert narrow.width == 3 and mask(whole, kept).width == WIDTH
    for found in (narrow, widen(narrow, 4), widen(narrow, WIDTH), mask(whole, kept)):
        torch.testing.assert_close(output(found, inputs), wanted, rtol=0, atol=1e-13)
    assert not mask(whole, kept).up[~kept].any() and not mask(whole, kept).down[:, ~kept].any()
    with pytest.raises(ValueError, match="does not fit"):
        widen(whole, 3)


def test_a_silenced_expert_puts_out_nothing() -> None:
    inputs = torch.randn(20, HIDDEN, dtype=torch.float64)
    assert not output(silenced(expert(1, biased=True)), inputs).any()
