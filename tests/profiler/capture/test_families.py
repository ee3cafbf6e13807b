"""Every family that transformers decorates: captured as it runs, with unchanged outputs; the others refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

import profiler
import store
from moescope.errors import ModelError
from tests.profiler.capture.tiny import REFUSED, WATCHED, Calls, batch, build, output_of, recorded_calls


def captured_ids(calls: Calls) -> np.ndarray:
    """(tokens, k) ids in descending weight, -1 where the family means none, from plain hooks."""
    ids, weights = calls.ids[0], calls.weights[0].float()
    if calls.layer.traits.zero_weight_is_none:
        ids = torch.where(weights == 0, -1, ids)
    return ids.gather(1, weights.sort(dim=1, descending=True, stable=True).indices).numpy()


@pytest.mark.parametrize("family", WATCHED)
def test_capture_equals_independent_computation(family: str, tmp_path: Path) -> None:
    model = build(family)
    inputs = batch(2, 8)
    with torch.no_grad(), recorded_calls(model) as calls:
        bare = output_of(model(**inputs))
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        watched = output_of(model(**inputs))
    assert torch.equal(bare, watched)

    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    trace = run.selections()
    outputs = run.table("expert_output").filter(pl.col("kind") == "routed")
    load = run.table("expert_load")
    for axis, entry in enumerate(calls):
        real = inputs["attention_mask"].reshape(-1).bool().numpy()
        ids = captured_ids(entry)[real]
        assert_array_equal(trace.ids[axis][_real(trace)], ids)
        counts = np.bincount(ids[ids >= 0], minlength=entry.layer.num_experts)
        of_layer = (pl.col("layer") == entry.layer.layer) & (pl.col("step") == entry.layer.step)
        assert_array_equal(load.filter(of_layer).sort("expert")["tokens"].to_numpy(), counts)
        assert_allclose(_norms(outputs.filter(of_layer), counts), _reference_norms(entry, real, len(counts)), rtol=1e-4)


def _real(trace: store.Trace) -> np.ndarray:
    return np.arange(trace.ids.shape[2])[None] < trace.lengths[:, None]


def _norms(frame: pl.DataFrame, counts: np.ndarray) -> np.ndarray:
    norms = np.zeros(len(counts))
    norms[frame["expert"].to_numpy()] = frame["norm_sum"].to_numpy()
    return norms


def _reference_norms(calls: Calls, real: np.ndarray, num_experts: int) -> np.ndarray:
    _, outputs = calls.rows()
    used = (calls.weights[0] != 0).numpy() | (not calls.layer.traits.zero_weight_is_none)
    norms = np.where(used & real[:, None], np.linalg.norm(outputs, axis=-1), 0)
    return np.bincount(calls.ids[0].numpy().ravel(), norms.ravel(), minlength=num_experts)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_are_named(family: str) -> None:
    with pytest.raises(ModelError, match="layer .* cannot be watched"):
        profiler.find_moe_layers(build(family))


def test_nllb_is_refused_because_it_runs_the_wrong_experts() -> None:
    with pytest.raises(ModelError, match="runs the wrong experts"):
        profiler.find_moe_layers(build("nllb-moe"))
