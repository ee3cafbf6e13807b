"""DERN-style recombination: where neurons go, and what becomes of those that receive some."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.edits import segments
from compressor.edits.segments import assign, rebuild
from compressor.weights import ExpertWeights
from tests.compressor.test_edits_methods import HIDDEN, WIDTH, close, expert, flattened, output


def rows(weights: ExpertWeights, *, gate: bool) -> np.ndarray:
    """(I, ...) segments, written out."""
    parts = [weights.up.numpy(), weights.down.T.numpy()]
    if gate and weights.gate is not None:
        parts.append(weights.gate.numpy())
    return np.concatenate(parts, axis=1)


def mixture(kept: dict[int, ExpertWeights], sources: list[tuple[int, int]], noise: float) -> ExpertWeights:
    """An expert whose neuron n is nearly neuron j of kept expert i, ``sources[n] == (i, j)``, half as loud."""
    draw = torch.Generator().manual_seed(5)
    parts = [kept[number].neurons(torch.tensor([neuron])) for number, neuron in sources]

    def near(name: str, dimension: int) -> Tensor:
        whole = 0.5 * torch.cat([getattr(part, name) for part in parts], dim=dimension)
        return whole + noise * torch.randn(whole.shape, generator=draw, dtype=whole.dtype)

    return ExpertWeights(up=near("up", 0), down=near("down", 1), gate=near("gate", 0))


SOURCES = [(4, 2), (1, 0), (1, 4), (4, 1), (1, 3)]


def test_planted_segments_find_their_expert() -> None:
    kept = {1: expert(1), 4: expert(4)}
    given = mixture(kept, SOURCES, 0.02)
    moved = assign([1, 4], [7], {**kept, 7: given}.__getitem__)
    assert [(entry.source, entry.target, entry.neurons.tolist()) for entry in moved] == [
        (7, 1, [1, 2, 4]),
        (7, 4, [0, 3]),
    ]


@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.4])
def test_assignment_is_the_largest_cosine_above_the_threshold(threshold: float) -> None:
    experts = {number: expert(number) for number in range(5)}
    found = {
        (entry.source, neuron): entry.target
        for entry in assign([0, 2, 4], [1, 3], experts.__getitem__, threshold=threshold)
        for neuron in entry.neurons.tolist()
    }
    wanted = {}
    for source in (1, 3):
        for neuron, segment in enumerate(rows(experts[source], gate=False)):
            cosines = {
                target: max(
                    float(segment @ other / np.linalg.norm(segment) / np.linalg.norm(other))
                    for other in rows(experts[target], gate=False)
                )
                for target in (0, 2, 4)
            }
            best = max(cosines, key=cosines.__getitem__)
            if cosines[best] >= threshold:
                wanted[source, neuron] = best
    assert found == wanted
    assert threshold > 0 or len(found) == 2 * WIDTH


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {number: expert(number) for number in range(5)}

    def found() -> list[tuple[int, int, list[int]]]:
        moved = assign([0, 2], [1, 3, 4], experts.__getitem__, threshold=0.0)
        return [(entry.source, entry.target, entry.neurons.tolist()) for entry in moved]

    whole = found()
    assert whole
    monkeypatch.setattr(segments, "_BLOCK", 1)
    assert found() == whole


def test_nobody_to_receive_and_gates_do_not_count() -> None:
    experts = {0: expert(0), 1: expert(1)}
    assert assign([], [1], experts.__getitem__) == []
    own = experts[0]
    assert own.gate is not None
    other_gate = ExpertWeights(up=own.up, down=own.down, gate=-own.gate)
    moved = assign([0], [1], {0: own, 1: other_gate}.__getitem__, threshold=0.999)
    assert moved[0].neurons.tolist() == list(range(WIDTH))


def test_clusters_are_weighted_means_of_direction_and_length() -> None:
    kept = {1: expert(1), 4: expert(4)}
    given = mixture(kept, SOURCES, 0.02)
    part = given.neurons(torch.tensor([1, 2, 4]))  # near neurons 0, 4 and 3 of expert 1
    found = rows(rebuild(kept[1], 3.0, [(part, 1.0)]), gate=True)
    own, received = rows(kept[1], gate=True), rows(part, gate=True)
    for neuron in range(WIDTH):
        members = [(own[neuron], 3.0)]
        members += [(received[place], 1.0) for place, target in enumerate((0, 4, 3)) if target == neuron]
        lengths = [np.linalg.norm(vector) for vector, _ in members]
        direction = sum(weight * vector / length for (vector, weight), length in zip(members, lengths, strict=True))
        mean = sum(weight * length for (_, weight), length in zip(members, lengths, strict=True))
        mean /= sum(weight for _, weight in members)
        np.testing.assert_allclose(found[neuron], mean * direction / np.linalg.norm(direction), rtol=0, atol=1e-12)


def plain_k_means(own: ExpertWeights, other: ExpertWeights, weights: tuple[float, float]) -> np.ndarray:
    """The description followed with loops: (I, 3 H) centroids in no order; clusters never run empty here."""
    vectors = np.concatenate([rows(own, gate=True), rows(other, gate=True)])
    importance = np.repeat(weights, WIDTH)
    largest = np.abs(vectors[:, 2 * HIDDEN :]).max(1)
    centres = [vectors[n] for n in np.argsort(-largest)[:WIDTH]]
    lengths = np.linalg.norm(vectors, axis=1)
    for _ in range(20):
        cosines = np.array([[v @ c / np.linalg.norm(v) / np.linalg.norm(c) for c in centres] for v in vectors])
        label = cosines.argmax(1)
        assert len(set(label)) == WIDTH
        centres = []
        for cluster in range(WIDTH):
            inside = np.flatnonzero(label == cluster)
            direction = sum(importance[n] * vectors[n] / lengths[n] for n in inside)
            mean = np.average(lengths[inside], weights=importance[inside])
            centres.append(mean * direction / np.linalg.norm(direction))
    return np.array(centres)


@pytest.mark.parametrize("seed", range(6))
def test_rebuilding_follows_the_description(seed: int) -> None:
    own, other = expert(seed), expert(100 + seed)
    found = rows(rebuild(own, 2.0, [(other, 0.5)]), gate=True)
    wanted = plain_k_means(own, other, (2.0, 0.5))
    np.testing.assert_allclose(found[np.argsort(found[:, 0])], wanted[np.argsort(wanted[:, 0])], rtol=0, atol=1e-12)


def test_equal_segments_merge_to_themselves() -> None:
    own = expert(1, biased=True)
    for received in ([(own.map(torch.clone), 0.5)], [(own.neurons(torch.tensor([3, 1])), 2.0), (own, 0.1)]):
        close(rebuild(own, 1.0, received), own, 1e-13)


@pytest.mark.parametrize("scale", [0.5, 1.1, 3.0])
def test_near_copies_of_an_expert_give_back_the_expert(scale: float) -> None:
    own = expert(1, dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    other = own.map(lambda tensor: scale * (tensor + 0.01 * torch.randn(tensor.shape, generator=draw)))
    third = other.map(lambda tensor: tensor + 0.01 * torch.randn(tensor.shape, generator=draw))
    found, wanted = rows(rebuild(own, 1.0, [(other, 1.0), (third, 1.0)]), gate=True), rows(own, gate=True)
    cosines = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosines.min() > 0.999
    lengths = np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
    np.testing.assert_allclose(lengths, (1 + 2 * scale) / 3, rtol=0.02)


def test_a_better_segment_takes_the_place_of_a_weak_neuron() -> None:
    own, other = expert(1), expert(2)
    assert own.gate is not None and other.gate is not None
    weak = own.neurons(torch.arange(WIDTH))
    assert weak.gate is not None
    for tensor in (weak.up[2:3], weak.gate[2:3], weak.down[:, 2:3]):
        tensor.mul_(1e-6)  # no reason to be a centre; it joins whatever is nearest
    loud = other.neurons(torch.tensor([0]))
    assert loud.gate is not None
    loud = ExpertWeights(up=loud.up, down=loud.down, gate=loud.gate * 5)
    found = rows(rebuild(weak, 1.0, [(loud, 1.0)]), gate=True)
    cosines = (
        found @ rows(loud, gate=True)[0] / np.linalg.norm(found, axis=1) / np.linalg.norm(rows(loud, gate=True)[0])
    )
    assert cosines.max() > 0.999


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.0)])
def test_importance_of_zero_is_no_division_by_zero(weights: tuple[float, float]) -> None:
    found = rebuild(expert(1), weights[0], [(expert(2), weights[1])])
    assert np.isfinite(flattened(found)).all()


def test_neurons_of_zeros_take_part_in_nothing() -> None:
    own = expert(1)
    for tensor in (own.up[1], own.gate[1] if own.gate is not None else own.up[1], own.down[:, 1]):
        tensor.zero_()
    found = rebuild(own, 1.0, [(own.map(torch.clone), 1.0)])
    inputs = torch.randn(10, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(output(found, inputs), output(own, inputs), rtol=0, atol=1e-12)
