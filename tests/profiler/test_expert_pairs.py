"""Runs of a model and of what a plan made of it: experts that went or became one, against loops over sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moescope.errors import InputError
from profiler.alignment import align
from profiler.comparison import compare
from profiler.expert_pairs import Made, renamed
from tests.profiler.paired import EXPERTS, TOP_K, routed, texts, write

KEPT = {(1, 0): [[0], [1, 4], [2], [3, 5, 6]], (2, 0): [[0], [1], [2], [4], [6]]}


@pytest.mark.parametrize("base", ["first", "second"])
def test_experts_that_went_or_became_one(tmp_path: Path, base: str) -> None:
    rng = np.random.default_rng(5)
    tokens = texts(rng, [30, 7, 12])
    before = routed(rng, tokens)
    made = [
        np.stack([np.argsort(rng.random((len(one), size)), 1)[:, :TOP_K].astype(np.int16) for size in (4, 5)])
        for one in tokens
    ]
    original = write(tmp_path, "original", tokens, before)
    small = write(tmp_path, "small", tokens, made, experts=5)
    pair = (original, small) if base == "first" else (small, original)
    with pytest.raises(InputError, match="8 and 5 experts|5 and 8 experts"):
        align(*pair)
    found = compare(align(*pair, made=Made(base, KEPT)))  # type: ignore[arg-type]
    for axis, layer in enumerate(found.layers):
        members = KEPT[layer.pair.first.layer, 0]
        of = {expert: place for place, group in enumerate(members) for expert in group}
        overlap = exact = 0.0
        for one, other in zip(np.concatenate(before, 1)[axis], np.concatenate(made, 1)[axis], strict=True):
            a, b = {of.get(expert, -1 - expert) for expert in one.tolist()}, set(other.tolist())
            overlap += len(a & b) / max(len(a), len(b))
            exact += a == b
        assert layer.sums[:, 0].sum() == pytest.approx(overlap)
        assert layer.sums[:, 1].sum() == exact
        loads = layer.loads if base == "first" else layer.loads[::-1]
        for place, group in enumerate(members):
            took = sum((one[axis] == place).sum() for one in made)
            used = sum(np.isin(one[axis], group).any(1).sum() for one in before)
            assert (loads[0].sum(0)[min(group)], loads[1].sum(0)[min(group)]) == (used, took)
        gone = [expert for expert in range(EXPERTS) if expert not in of]
        assert not loads[1].sum(0)[gone].any() and loads[0].sum(0)[gone].sum() == sum(
            np.isin(one[axis], gone).sum() for one in before
        )
    for one in pair:
        one.close()


def test_what_the_plan_does_not_leave_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = texts(rng, [9])
    original = write(tmp_path, "original", tokens, routed(rng, tokens))
    small = write(tmp_path, "small", tokens, routed(rng, tokens, 1), layers=(1,))
    with pytest.raises(InputError, match="has no MoE layer 2, which the plan leaves"):
        align(original, small, made=Made("first", {}))
    with pytest.raises(InputError, match="has no MoE layer 0, which the plan leaves"):
        align(original, small, made=Made("first", {}, kept_layers=[1, 3]))
    assert [pair.first.layer for pair in align(original, small, made=Made("first", {}, [0, 2])).layers] == [2]
    with pytest.raises(InputError, match="has 8 experts; the plan leaves 9"):
        align(original, small, made=Made("first", {(2, 0): [[0]] * 9}, kept_layers=[0, 2]))


def test_weights_of_experts_that_became_one_add_up() -> None:
    ids, weights = np.array([[3, 1, 5], [2, -1, -1]], np.int16), np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    names = np.array([0, 1, 2, 1, 4, 1], np.int16)
    got, held = renamed(ids, weights, names)
    assert got.tolist() == [[1, -1, -1], [2, -1, -1]]
    assert held is not None
    np.testing.assert_allclose(held, np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert weights[0, 1] == 0.3


@pytest.mark.parametrize("block", [1, 1 << 18])
def test_sequences_and_tokens_that_flip_most(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiler.alignment.BLOCK_TOKENS", block)
    rng = np.random.default_rng(2)
    tokens = texts(rng, [20, 1, 33])
    before, after = routed(rng, tokens), routed(rng, tokens)
    after[0][:, :15] = before[0][:, :15]
    first, second = write(tmp_path, "a", tokens, before), write(tmp_path, "b", tokens, after)
    found = compare(align(first, second))
    rows = []
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        same = [
            [set(a) == set(b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
            for x, y in zip(one, other, strict=True)
        ]
        assert found.sequences[number, 2] == np.sum(same) and found.sequences[number, 0] == np.size(same)
        shared = [
            [len(set(a) & set(b)) / TOP_K for a, b in zip(x.tolist(), y.tolist(), strict=True)]
            for x, y in zip(one, other, strict=True)
        ]
        flips, overlap = 2 - np.sum(same, 0), np.mean(shared, 0)
        rows += [
            (-int(f), round(float(o), 6), number, at) for at, (f, o) in enumerate(zip(flips, overlap, strict=True)) if f
        ]
    got = list(zip((-found.flips.flipped).tolist(), found.flips.overlap.round(6).tolist(),
                   found.flips.pair.tolist(), found.flips.position.tolist(), strict=True))  # fmt: skip
    assert got == sorted(rows)
    first.close()
    second.close()
