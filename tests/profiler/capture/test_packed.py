"""Experts with packed weights are seen as those of the dequantized model, through the modules and calls of the library.

The library's kernels need a GPU. Here they are plain torch (``packed.py``), so that nothing is said about the kernels
themselves, but everything about how they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from polars.testing import assert_frame_equal

import profiler
import store
from moescope.errors import ModelError
from tests.profiler.capture.packed import BUILDERS, experts_of
from tests.profiler.capture.tiny import batch, output_of

PLACES = ("channel", "sequence", "position")


def watched(model: Any, folder: Path, name: str, level: str) -> tuple[torch.Tensor, store.Run]:
    with torch.no_grad(), profiler.watch(model, store=folder, name=name, level=level) as session:
        output = output_of(model(**batch(padding="left")))
    assert session.path is not None
    return output, store.open_run(session.path)


@pytest.mark.parametrize("kind", BUILDERS)
def test_packed_experts_show_what_the_dequantized_ones_show(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = BUILDERS[kind](monkeypatch)
    assert {type(experts).__name__ for experts in experts_of(model)} == {kind}
    with torch.no_grad():
        before = output_of(model(**batch(padding="left")))
    for level in ("routing", "routing,activations"):
        name = level.rpartition(",")[2]
        during, run = watched(model, tmp_path, f"packed-{name}", level)
        assert torch.equal(before, during)
        _, expected = watched(plain, tmp_path, f"plain-{name}", level)
        assert_array_equal(run.selections().ids, expected.selections().ids)
        assert_allclose(run.selections().weights, expected.selections().weights, atol=1 / 255)
        tables = ["expert_load", "router_load", "residual", "expert_output", "expert_vector"]
        tables += ["neuron_activation"] if kind == "FP8Experts" else []
        for table in tables:
            wanted = expected.table(table)
            columns = [column for column in wanted.columns if not column.endswith(PLACES)]
            columns = [column for column in columns if column != "input_max" or kind == "FP8Experts"]
            seen = run.table(table).select(columns)
            assert_frame_equal(seen, wanted.select(columns), rel_tol=1e-4, abs_tol=1e-4, check_row_order=False)
        row = run.table("check").filter(name="weights as stored").to_dicts()[0]
        assert row["status"] == "pass" and f"ran packed ({run.info.settings['weights']['stored']}" in row["detail"]
        assert ("second call" in row["detail"]) == (name == "activations")
        assert run.badge.status == "valid", run.badge.reason
    assert run.table("expert_weight").is_empty()
    layer = run.layers[0]
    assert (layer.num_experts, layer.experts_class) == (8, kind)
    assert layer.expert_width == expected.layers[0].expert_width
    rebuilt = run.table("check").filter(name="rows rebuild output")
    assert rebuilt["value"].max() < 1e-4


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_fp8_is_seen_in_every_backend(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = BUILDERS["FP8Experts"](monkeypatch)
    model.set_experts_implementation(backend)
    with torch.no_grad():
        before = output_of(model(**batch(padding="left")))
    during, run = watched(model, tmp_path, "packed", "activations")
    assert torch.equal(before, during)
    _, expected = watched(plain, tmp_path, "plain", "activations")
    tables = ["expert_output"] if backend == "eager" else ["expert_output", "neuron_activation"]
    for table in tables:
        columns = [column for column in expected.table(table).columns if not column.endswith((*PLACES, "input_max"))]
        frames = (entry.table(table).select(columns) for entry in (run, expected))
        assert_frame_equal(*frames, rel_tol=1e-4, abs_tol=1e-4, check_row_order=False)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("level", ["similarity", "errors", "gradients"])
def test_levels_that_need_the_weights_are_refused(
    kind: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = BUILDERS[kind](monkeypatch)
    with pytest.raises(ModelError, match=rf"level {level} needs plain weights, but model\.layers\.0.* \({kind}\)"):
        profiler.watch(model, store=tmp_path, name="packed", level=f"routing,{level}")


def test_a_router_that_never_runs_predicts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, builder in BUILDERS.items():
        model, _ = builder(monkeypatch)
        if kind == "Mxfp4GptOssExperts":
            with pytest.raises(ModelError, match=r"lookahead needs routers that run.*\(Mxfp4GptOssExperts\)"):
                profiler.watch(model, store=tmp_path, name=kind, level="lookahead")
        else:
            _, run = watched(model, tmp_path, kind, "lookahead")
            assert not run.table("lookahead").is_empty()


def test_packed_experts_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind, builder in BUILDERS.items():
        model, _ = builder(monkeypatch)
        before = [set(vars(experts)) for experts in experts_of(model)]
        watched(model, tmp_path, kind, "activations")
        assert [set(vars(experts)) for experts in experts_of(model)] == before
