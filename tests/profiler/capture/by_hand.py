"""Calls of experts as a test has computed them by hand, and the tables of a run against them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from torch import Tensor

import store

Key = tuple[int, int]
"""(layer, step)"""


@dataclass
class Expected:
    """One call of one layer's experts; all in float64, all rows of the forward.

    Attributes:
        ids: (tokens, k) selected experts, -1 = none.
        gates: (tokens, k) gate weights.
        outputs: (tokens, k, hidden) what the experts put out.
        activations: (tokens, k, I) what enters their second projection; None: not compared.
        inputs: (tokens, k, hidden) what the experts were given; None: not compared.
        weights_input: the gate weights are in the inputs already, so that outputs are added as they are.
    """

    ids: Tensor
    gates: Tensor
    outputs: Tensor
    activations: Tensor | None = None
    inputs: Tensor | None = None
    weights_input: bool = False


def check(run: store.Run, key: Key, expected: Expected, *, real: Tensor, experts: int) -> None:
    """Counts exactly, sums and maxima to 1e-4.

    Args:
        run: of one forward.
        key: the layer and the step.
        expected: the call.
        real: (rows,) bool, which rows are no padding.
        experts: E.
    """
    ids, gates = expected.ids[real], torch.where(expected.ids >= 0, expected.gates.double(), 0.0)[real]
    token, rank = torch.where(ids >= 0)
    member = torch.zeros(*ids.shape, experts, dtype=torch.float64)
    member[token, rank, ids[token, rank]] = 1.0
    used = member.sum((0, 1)) > 0
    _check_trace(run, key, ids, gates)

    load = _of(run, "expert_load", key)
    assert load["expert"].to_list() == list(range(experts))
    assert_array_equal(load["tokens"].to_numpy(), member.sum((0, 1)).numpy())
    assert_allclose(load["gate_sum"].to_numpy(), _sums(member, gates), rtol=1e-4, atol=1e-9)

    outputs = expected.outputs[real]
    weights = (ids >= 0).double() if expected.weights_input else gates
    norms = outputs.norm(dim=2)
    parts: dict[str, Tensor] = {"norm_sum": norms, "norm_square_sum": norms**2, "gated_norm_sum": weights * norms}
    output = _of(run, "expert_output", key)
    assert output["expert"].to_list() == torch.where(used)[0].tolist()
    assert_array_equal(output["tokens"].to_numpy(), member.sum((0, 1))[used].numpy())
    for column, values in parts.items():
        assert_allclose(output[column].to_numpy(), _sums(member, values)[used], rtol=1e-4, atol=1e-7, err_msg=column)
    largest = (member * outputs.abs().amax(2)[..., None]).amax((0, 1))[used]
    assert_allclose(output["output_max"].to_numpy(), largest.numpy(), rtol=1e-4, atol=1e-7)

    vectors = {"output_sum": outputs, "gated_output_sum": weights[..., None] * outputs}
    if expected.inputs is not None:
        vectors["input_square_sum"] = expected.inputs[real].double() ** 2
    _check_vectors(_of(run, "expert_vector", key), vectors, member, used)
    if expected.activations is not None:
        inner = expected.activations[real].abs()
        gated = weights.abs()[..., None] * inner
        neurons = {"square_sum": inner**2, "gated_absolute_sum": gated, "gated_square_sum": gated**2}
        _check_vectors(_of(run, "neuron_activation", key), neurons, member, used)

    total = torch.einsum("tk,tkh->th", weights, outputs)
    row = run.table("moe_output").filter((pl.col("layer") == key[0]) & (pl.col("step") == key[1]))
    assert row["output_square_sum"].to_list() == pytest.approx([float(total.square().sum())], rel=1e-4)


def _check_trace(run: store.Run, key: Key, ids: Tensor, gates: Tensor) -> None:
    trace = run.selections()
    axis = trace.layers.index(key)
    there = np.arange(trace.ids.shape[2])[None] < trace.lengths[:, None]
    order = gates.sort(dim=1, descending=True, stable=True).indices
    found, wanted = trace.ids[axis][there], ids.gather(1, order).numpy()
    width = min(found.shape[1], wanted.shape[1])
    assert_array_equal(found[:, :width], wanted[:, :width])
    assert (found[:, width:] == -1).all()
    assert (wanted[:, width:] == -1).all()
    kept = gates.gather(1, order).numpy()[:, :width]
    assert_allclose(trace.weights[axis][there][:, :width], kept, atol=np.abs(kept).max(initial=0.0) / 509)


def _check_vectors(frame: pl.DataFrame, parts: dict[str, Tensor], member: Tensor, used: Tensor) -> None:
    assert frame["expert"].to_list() == torch.where(used)[0].tolist()
    for column, values in parts.items():
        wanted = torch.einsum("tke,tkw->ew", member, values)[used].numpy()
        slack = 1e-5 * np.abs(wanted).max(initial=0.0)
        assert_allclose(np.array(frame[column].to_list()), wanted, rtol=1e-4, atol=slack, err_msg=column)


def _sums(member: Tensor, values: Tensor) -> NDArray[np.float64]:
    sums: NDArray[np.float64] = torch.einsum("tke,tk->e", member, values.double()).numpy()
    return sums


def _of(run: store.Run, table: str, key: Key) -> pl.DataFrame:
    frame = run.table(table).filter((pl.col("layer") == key[0]) & (pl.col("step") == key[1]))
    return (frame.filter(pl.col("kind") == "routed") if "kind" in frame.columns else frame).sort("expert")
