"""Groups of experts from stored sums: M-SMoE's and STUN's, against independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist, squareform

import store
from moescope.errors import PlanError
from planner.merge import agglomerate, logit_similarity, m_smoe, router_distance, stun
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import LayerTokens, Tokenwise, observe, watched


@pytest.fixture(scope="module", params=("olmoe", "deepseek_v3"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[store.Run, Tokenwise]:
    model = build(request.param)
    return watched(model, tmp_path_factory.mktemp(request.param)), observe(model)


def _layer(frame: pl.DataFrame, layer: LayerTokens) -> pl.DataFrame:
    return frame.filter(pl.col("layer") == layer.layer.layer).sort("expert")


def _cosine(logits: Any) -> Any:
    """Cosine of logit columns, straight from the stored logits."""
    unit = logits / np.linalg.norm(logits, axis=0)
    return unit.T @ unit


def test_logit_cosine_from_the_gram_matrix(case: tuple[store.Run, Tokenwise]) -> None:
    run, seen = case
    for layer in seen.layers:
        rows = run.table("expert_pair").filter(pl.col("layer") == layer.layer.layer)
        gram = np.zeros((layer.size, layer.size))
        for row in rows.iter_rows(named=True):
            gram[row["expert"]] += row["logit_products"]  # prompt and decode
        assert_allclose(logit_similarity(gram), _cosine(layer.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 8])
def test_m_smoe(case: tuple[store.Run, Tokenwise], groups: int) -> None:
    run, seen = case
    frame = m_smoe(run, groups=groups)
    counts = [np.bincount(layer.ids.ravel(), minlength=layer.size) for layer in seen.layers]
    shares = [count / count.sum() for count in counts]
    for share in shares:
        share[share.argmax()] = np.inf
    every = sorted(
        ((-share[expert], index, expert) for index, share in enumerate(shares) for expert in range(len(share)))
    )
    dominant = {(index, expert) for _, index, expert in every[: groups * len(shares)]}
    assert int(frame["dominant"].sum()) == groups * len(shares)
    for index, layer in enumerate(seen.layers):
        leaders = sorted(expert for place, expert in dominant if place == index)
        cosine = _cosine(layer.logits)
        expected = [
            expert if expert in leaders else leaders[int(np.argmax(cosine[expert, leaders]))]
            for expert in range(layer.size)
        ]
        found = _layer(frame, layer)
        assert found["group"].to_list() == expected
        assert found.filter("dominant")["expert"].to_list() == leaders
        for group in leaders:
            members = [expert for expert in range(layer.size) if expected[expert] == group]
            weights = found["weight"].to_numpy()[members]
            assert_allclose(weights, counts[index][members] / counts[index][members].sum(), rtol=1e-9)


def test_m_smoe_meets_the_number_where_shares_are_equal(tmp_path: Path) -> None:
    """The published rule, larger than the share that comes next, would leave one group per layer here."""
    writer = store.RunWriter.create(tmp_path, "ties", store.RunInfo(model="toy"))
    key = {"step": 0, "domain": "text", "phase": "prompt"}
    experts = [{**key, "layer": layer, "expert": expert} for layer in range(2) for expert in range(4)]
    writer.write_shard(
        {
            "layer": {"layer": [0, 1], "step": [0, 0], "num_experts": [4, 4], "top_k": [1, 1]},
            "router_load": pl.DataFrame([{**key, "layer": layer, "tokens": 20} for layer in range(2)]),
            "expert_load": pl.DataFrame([{**row, "kind": "routed", "tokens": 5} for row in experts]),
            "expert_pair": pl.DataFrame(
                [{**row, "logit_products": np.eye(4)[row["expert"]].tolist()} for row in experts]  # type: ignore[call-overload]
            ),
        }
    )
    frame = m_smoe(store.open_run(writer.finish(seconds=1.0)), groups=2)
    assert frame.filter("dominant")["expert"].to_list() == [0, 1, 2, 0]  # the lower layer first
    assert frame["group"].to_list() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert frame.group_by("layer", "group").agg(pl.col("weight").sum())["weight"].to_list() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_stun(case: tuple[store.Run, Tokenwise], weight: float) -> None:
    run, seen = case
    frame = stun(run, clusters=3, coactivation_weight=weight)
    table = run.table("router_row")
    for layer in seen.layers:
        weights = np.array(_layer(table, layer)["weights"].to_list(), np.float64)
        used = layer.dense(np.ones_like(layer.gate), seen.where())
        together = used.T @ used
        mean = together[~np.eye(layer.size, dtype=bool)].mean()
        distance = cdist(weights, weights) - weight * together / mean
        np.fill_diagonal(distance, 0.0)
        labels = fcluster(linkage(squareform(distance, checks=False), "complete"), 3, criterion="maxclust")
        expected = [int(np.flatnonzero(labels == label)[0]) for label in labels]
        assert _layer(frame, layer)["cluster"].to_list() == expected


def test_agglomerate_against_scipy() -> None:
    generator = np.random.default_rng(3)
    for size in (2, 9, 40):
        points = generator.normal(size=(size, 5))
        distance = cdist(points, points)
        tree = linkage(squareform(distance, checks=False), "complete")
        for clusters in {1, 2, size // 2, size}:
            labels = fcluster(tree, clusters, criterion="maxclust")
            expected = [np.flatnonzero(labels == label)[0] for label in labels]
            assert_array_equal(agglomerate(distance, clusters), expected)


def test_agglomerate_takes_the_lower_pair_of_equal_ones() -> None:
    assert agglomerate(np.ones((4, 4)), 3).tolist() == [0, 0, 2, 3]
    assert agglomerate(np.ones((4, 4)), 2).tolist() == [0, 0, 0, 3]


def test_router_distance_without_coactivation_is_euclidean() -> None:
    rows = np.random.default_rng(4).normal(size=(6, 11))
    assert_allclose(router_distance(rows, np.zeros((6, 6))), cdist(rows, rows), atol=1e-6)


def test_numbers_that_cannot_be_are_refused(case: tuple[store.Run, Tokenwise]) -> None:
    run, _ = case
    for number in (0, 9):
        with pytest.raises(PlanError, match=rf"groups {number} is outside 1\.\.8"):
            m_smoe(run, groups=number)
        with pytest.raises(PlanError, match=rf"clusters {number} is outside 1\.\.8"):
            stun(run, clusters=number)
    with pytest.raises(PlanError, match="pooled over domains"):
        m_smoe(run, groups=2, domain="code")
