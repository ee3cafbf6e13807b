"""What-if routing against routers of real families and rules on the running model, and its kernels against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import profiler
import store
from compressor.routing import Ratio, TopP, rerouted
from planner.route.shift import rerouted as chosen_anew
from planner.simulate.what_if import what_if
from planner.simulate.what_if._rows import entropy, exponentials, scale_32
from planner.simulate.what_if._scores import gates
from planner.simulate.what_if._smoothing import smoothed
from tests.profiler.capture.tiny import batch, build

EXPERTS, TOP_K = 8, 2
TEXT: dict[str, Any] = {"rows": 8, "length": 24, "padding": "none"}


def _collected(folder: Path, family: str) -> tuple[Any, store.Run]:
    model = build(family)
    with profiler.watch(model, store=folder, name=family, router_scores=EXPERTS) as session, torch.no_grad():
        model(**batch(**TEXT))
    assert session.path is not None
    return model, store.open_run(session.path)


def _recorded_load(run: store.Run, layer: int) -> np.ndarray[Any, Any]:
    return np.bincount(run.layer_selections(layer=layer).ids.ravel(), minlength=EXPERTS)


def test_a_softmax_router_and_rules_on_the_running_model(tmp_path: Path) -> None:
    model, run = _collected(tmp_path, "olmoe")
    found = what_if(run, "top_k", values=[TOP_K])
    assert found.certainty == "exact" and (found.own_choice == 1).all() and (found.softmax_gate == 1).all()
    assert (found.changed_tokens == 0).all() and (found.mean_active == TOP_K).all()
    for axis, (layer, _) in enumerate(found.layers):
        assert_array_equal(found.load[0, axis], _recorded_load(run, layer))
    first = found.layers[0]
    tried: tuple[tuple[str, Any, float], ...] = (
        ("ratio", Ratio, 0.5), ("ratio", Ratio, 0.8), ("top_p", TopP, 0.3), ("top_p", TopP, 0.8),
    )  # fmt: skip
    for method, rule, value in tried:
        with rerouted(model, {first: rule(value)}) as routing, torch.no_grad():
            model(**batch(**TEXT))
        active = routing.take()[first].active.numpy()
        told = what_if(run, method, values=[value], layers=[first[0]])
        live = np.bincount(active, minlength=told.counts.shape[-1])
        # At most those for which the 8 bits of gate weights or the 16 of logits may decide.
        doubtful = int(np.ceil(told.rounding[0, 0] * told.tokens[0])) if method == "ratio" else 1
        assert np.abs(told.counts[0, 0] - live).sum() <= 2 * doubtful
        assert 1 < active.mean() < EXPERTS


def test_a_sigmoid_router_with_a_selection_bias_is_a_proxy(tmp_path: Path) -> None:
    _, run = _collected(tmp_path, "deepseek_v3")
    found = what_if(run, "top_p", values=[0.5])
    assert (found.own_choice < 1).any() and found.certainty == "proxy"
    assert "not those of the largest logits" in found.why and "no softmax" in found.why
    assert (found.softmax_gate < 0.5).all()
    moved = what_if(run, "bias", values=[0.0, 1.0], bias={key: np.linspace(-1, 1, EXPERTS) for key in found.layers})
    assert (moved.changed_others[0] == 0).all()  # no bias changes nothing, whatever the router chose
    for axis, (layer, _) in enumerate(moved.layers):
        scores, chosen = run.layer_scores(layer=layer), run.layer_selections(layer=layer).ids
        before = np.sort(scores.ids[:, :TOP_K], 1)
        shifted = np.take_along_axis(np.linspace(-1, 1, EXPERTS), scores.ids.ravel(), 0).reshape(scores.ids.shape)
        order = np.argsort(-(scores.logits.astype(float) + shifted), axis=1, kind="stable")
        changed = (np.sort(np.take_along_axis(scores.ids, order, 1)[:, :TOP_K], 1) != before).any(1)
        other = (np.sort(chosen, 1) != before).any(1)
        assert moved.changed_others[1, axis] == pytest.approx((changed & other).sum() / changed.sum())


def test_what_a_gate_is_told_by() -> None:
    logits = np.array([[2.0, 1.0, 0.0]], np.float32)
    ids, few = np.array([[0, 1]], np.int16), np.array([[0, 2, 1]], np.int16)

    def told(weights: Any, scored: Any = ((0, 1, 2),), rounding: float = 0.5 / 255) -> list[int]:
        found = np.zeros(2, np.int64)
        gates(
            ids, np.array([weights], np.float32), np.array([rounding], np.float32), np.array(scored, np.int16), logits,
            0.01, found,
        )  # fmt: skip
        return found.tolist()

    softmax = 1 / (1 + np.exp(-1.0))
    assert told([softmax, 1 - softmax]) == [1, 1]
    assert told([0.4 * softmax, 0.4 * (1 - softmax)]) == [1, 1]
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, 1.0])))
    assert told(sigmoid / sigmoid.sum()) == [1, 0]
    assert told([softmax, 1 - softmax], few) == [1, 0]  # its second logit is 0
    assert told([softmax, 1 - softmax], [[0, 2, -1]]) == [0, 0]


@pytest.mark.parametrize(("gate", "factor", "noted"), [(None, 4, False), ([1.0], 6, False), ("absent", 6, True)])
def test_operations_go_by_the_gate_projection(tmp_path: Path, gate: Any, factor: int, noted: bool) -> None:
    place: dict[str, Any] = {"sequence": np.zeros(2, int), "position": np.arange(2)}
    frames: dict[str, Any] = {
        "route_chunk": store.pack_trace(
            layer=0, ids=np.array([[0, 1], [1, 0]]), weights=np.array([[0.7, 0.3]] * 2), num_experts=2, **place
        ),
        "layer": {"layer": [0], "step": [0], "num_experts": [2], "top_k": [2], "expert_width": [5]},
        "sequence": {"sequence": [0], "domain": ["a"], "tokens": [2]},
    }
    if gate != "absent":
        schema = {"gate_norm": pl.List(pl.Float32), "up_norm": pl.List(pl.Float32), "down_norm": pl.List(pl.Float32)}
        frames["expert_weight"] = pl.DataFrame(
            {"layer": [0], "step": [0], "expert": [0], "kind": ["routed"], "gate_norm": [gate], "up_norm": [[1.0]],
             "down_norm": [[1.0]]}, schema_overrides=schema,
        )  # fmt: skip
    writer = store.RunWriter.create(tmp_path, "one", store.RunInfo(model="toy", hidden_size=8))
    writer.write_shard(frames)
    with store.open_run(writer.finish(seconds=1.0)) as run:
        found = what_if(run, "ratio", values=[0.9])
    assert found.flops_before[0] == 2 * factor * 8 * 5 and found.flops_share[0, 0] == 0.5
    assert any("gate projection" in note for note in found.notes) == noted


def test_exponentials_and_entropies() -> None:
    values = np.concatenate([np.linspace(-86, 20, 5001), [-500.0, 0.0]]).astype(np.float32)
    expected, found = np.exp(np.maximum(values.astype(float), -87)), values.copy()
    shifted, factors = np.empty_like(values), np.empty_like(values)
    exponentials(found, shifted, -87.0)
    scale_32(found, shifted.view(np.int32), factors.view(np.int32), factors)
    assert_allclose(found, expected, rtol=2e-7)
    share = np.array([0.0, 1e-30, 1e-4, 0.2, 0.35, 0.4499, 0.7, 1.0], np.float32)
    scratch, mantissas = np.empty(len(share), np.int32), np.empty_like(share)
    known = share[share > 0].astype(float)
    total = entropy(share, share.view(np.int32), scratch, mantissas.view(np.int32), mantissas)
    assert total == pytest.approx(-(known * np.log(known)).sum(), rel=1e-6)


def test_experts_without_a_score_are_unlikely_where_all_mass_is_stored() -> None:
    """The third token is the first but for an expert that neither would ever take; the second is another."""
    ids = np.array([[0, 1], [2, 1], [0, 3]], np.int16)
    logits = np.tile(np.array([0.0, -20.0], np.float32), (3, 1))
    load, sums, shared = np.zeros((2, 64), np.int64), np.zeros((1, 4), np.int64), np.zeros((2, 2), np.int64)
    kept, entropies = np.zeros(2), np.zeros(2)
    one, none = np.ones(3, np.int64), np.zeros(3, np.int64)
    own = np.zeros(1, np.float32)  # lambda: all of the tokens before
    smoothed(
        ids, logits, none.astype(np.float32), one, one, none, own, 16, 0.1, load, sums, kept, entropies, shared
    )  # fmt: skip
    assert entropies[0] < 0.01 and load[0, 0] == 3  # 0.69 if both were as like


def test_equal_sums_stay_with_the_larger_logit() -> None:
    ids = np.tile(np.array([3, 1, 2, 0], np.int16), (5, 1))
    logits = np.tile([2.0, 1.0, 1.0, 1.0], (5, 1))
    found = chosen_anew(ids, logits, np.zeros(4), top_k=2)
    assert not found.changed.any()
    assert not chosen_anew(ids, logits, np.full(4, 0.5), top_k=2).changed.any()
    assert chosen_anew(ids, logits, np.array([0.1, 0, 0, 0]), top_k=2).changed.all()
