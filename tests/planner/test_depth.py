"""Layers that change little, against hooks in float64, and how concentrated widths are."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import planner
import planner.importance as importance
import store
from compressor.plan import DropStep
from moescope.errors import PlanError
from planner.drop.depth import depth_probe, width_probe
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import Tokenwise, cosine, observe, watched


@pytest.fixture(scope="module", params=("olmoe", "deepseek_v3"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[store.Run, Tokenwise]:
    model = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return watched(model, folder, vectors_per_domain=True), observe(model)


def test_influence_is_that_of_the_tokens(case: tuple[store.Run, Tokenwise]) -> None:
    run, seen = case
    frame = depth_probe(run)
    assert len(frame) == 4 * 2
    for layer, domain, tokens, influence, _ in frame.iter_rows():
        where = seen.where(domain)
        expected = 1 - cosine(seen.entered[layer][where], seen.left[layer][where]).mean()
        assert influence == pytest.approx(expected, abs=1e-5) and tokens == where.sum()
    for layer in seen.layers:
        for domain in ("code", "german"):
            where = seen.where(domain)
            expected = 1 - cosine(layer.residual[where], (layer.residual + layer.total)[where]).mean()
            row = frame.filter(layer=layer.layer.layer, domain=domain)
            assert row["moe_influence"][0] == pytest.approx(expected, abs=1e-5)
    dense = set(range(4)) - {layer.layer.layer for layer in seen.layers}
    assert set(frame.filter(pl.col("moe_influence").is_null())["layer"]) == dense


@pytest.mark.parametrize(("preset", "column"), [("block_influence", "influence"), ("moe_blocks", "moe_influence")])
def test_the_worst_domain_counts(case: tuple[store.Run, Tokenwise], preset: str, column: str) -> None:
    run, _ = case
    worst = depth_probe(run).filter(pl.col(column).is_not_null()).group_by("layer").agg(pl.col(column).max())
    order = worst.sort(column)["layer"].to_list()
    plan = planner.make(run, preset=preset, share=0.5)
    (step,) = plan.steps
    assert isinstance(step, DropStep)
    gone = step.decoder_layers if column == "influence" else step.blocks
    assert list(gone) == sorted(order[: len(order) // 2])
    german = planner.make(run, preset=preset, share=0.5, domains=["german"]).evidence[0].layers
    own = depth_probe(run).filter(domain="german")
    for values in german:
        assert values.values[0] == pytest.approx(own.filter(layer=values.layer)[column][0], rel=1e-5)


def test_a_silent_block_has_lost_all_of_its_output(case: tuple[store.Run, Tokenwise]) -> None:
    run, seen = case
    plan = planner.make(run, preset="moe_blocks", share=0.5)
    blocks = len(plan.steps[0].blocks)  # type: ignore[union-attr]
    assert plan.estimate.layer_error == pytest.approx(blocks / len(seen.layers), rel=1e-5)
    assert plan.estimate.bytes_saved == 0
    assert planner.make(run, preset="block_influence", share=0.5).estimate.layer_error is None


def test_width_probe_is_counted_by_hand(case: tuple[store.Run, Tokenwise]) -> None:
    run, _ = case
    frame = width_probe(run)
    assert set(frame["domain"]) == {"code", "german"}
    for layer, step, domain, quarter, half, most, neurons in frame.iter_rows():
        scores = importance.score(run, "width", domain=domain).filter(layer=layer, step=step, kind="routed")["value"]
        ordered = np.sort(scores.to_numpy())[::-1]
        shares = [ordered[: int(np.ceil(part * len(ordered)))].sum() / ordered.sum() for part in (0.25, 0.5, 0.75)]
        assert (quarter, half, most) == pytest.approx(tuple(shares)) and neurons == len(ordered)


def test_runs_without_a_residual_stream_are_refused(case: tuple[store.Run, Tokenwise], tmp_path: object) -> None:
    run, _ = case
    with pytest.raises(PlanError, match="what 'heads' is not known"):
        planner.make(run, preset="block_influence", share=0.5, what="heads")
    table = run.table
    try:
        run.table = lambda name, **options: (
            table(name, **options).clear() if name == "residual" else table(name, **options)
        )  # type: ignore[method-assign]
        with pytest.raises(PlanError, match="has no residual.input_cosine_sum: collect it with --level activations"):
            planner.make(run, preset="block_influence", share=0.5)
    finally:
        run.table = table  # type: ignore[method-assign]
