"""Second moments of a run for merges by subspace: added up over what the plan's domains say, read layer by layer."""

from __future__ import annotations

from pathlib import Path

import by_hand
import numpy as np
import polars as pl
import pytest

import store
from app.moments import Moments
from compressor.plan import MergeGroup, MergeLayer, MergeStep, Plan, Provenance
from moescope.errors import PlanError

HIDDEN, EXPERTS, WIDTH = 4, 4, 8


def merging(domains: tuple[str, ...]) -> Plan:
    groups = tuple(MergeGroup(lead=lead, members=(lead, lead + 1), weights=(0.5, 0.5)) for lead in (0, 2))
    layers = tuple(MergeLayer(layer=layer, groups=groups) for layer in (1, 2))
    provenance = Provenance(run="mine", domains=domains, tool_version="0")
    return by_hand.plan(MergeStep(grouping="sub_moe", method="subspace", rank=2, layers=layers), provenance=provenance)


def write(folder: Path, domains: tuple[str, ...], *, neurons: bool = True) -> tuple[Path, dict[str, np.ndarray]]:
    """A run with moments of these domains and both phases, and (domains, phases, layers, ...) what stands in it."""
    rng = np.random.default_rng(0)
    products = rng.normal(size=(len(domains), 2, 2, HIDDEN, HIDDEN)).astype(np.float32)
    squares = rng.random((len(domains), 2, 2, EXPERTS, WIDTH)).astype(np.float32)
    moments, activations = [], []
    for d, domain in enumerate(domains):
        for p, phase in enumerate(("prompt", "decode")):
            for at, layer in enumerate((1, 2)):
                where = {"layer": layer, "step": 0, "domain": domain, "phase": phase, "tokens": 9}
                for channel in range(HIDDEN):
                    moments.append({**where, "channel": channel, "products": products[d, p, at, channel].tolist()})
                for expert in range(EXPERTS):
                    row = {**where, "expert": expert, "square_sum": squares[d, p, at, expert].tolist()}
                    activations += [{**row, "kind": "routed"}]
                activations.append({**where, "expert": 0, "kind": "shared", "square_sum": [9.0] * WIDTH})
    writer = store.RunWriter.create(folder, "mine", store.RunInfo(model="toy", num_layers=3))
    shard = {"moment": pl.DataFrame(moments)}
    writer.write_shard(shard | ({"neuron_activation": pl.DataFrame(activations)} if neurons else {}))
    return writer.finish(), {"products": products, "squares": squares}


@pytest.mark.parametrize(
    ("kept", "asked", "counted"),
    [(("a", "b"), ("a", "b"), (0, 1)), (("a", "b"), ("b",), (1,)), (("",), ("a",), (0,))],
)
def test_moments_are_the_sums_over_the_plans_domains(
    tmp_path: Path, kept: tuple[str, ...], asked: tuple[str, ...], counted: tuple[int, ...]
) -> None:
    path, truth = write(tmp_path, kept)
    with store.open_run(path) as run:
        moments = Moments(run, merging(asked))
        assert list(moments) == [(1, 0), (2, 0)]
        for at, key in enumerate(moments):
            expected = {name: values[list(counted), :, at].sum((0, 1)) for name, values in truth.items()}
            np.testing.assert_allclose(moments[key].input.numpy(), expected["products"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(moments[key].activation_square.numpy(), expected["squares"], rtol=1e-5)
        with pytest.raises(KeyError):
            moments[0, 0]


def test_a_run_without_them_names_the_level(tmp_path: Path) -> None:
    path, _ = write(tmp_path, ("a",), neurons=False)
    with store.open_run(path) as run, pytest.raises(PlanError, match="--level routing,activations"):
        Moments(run, merging(("a",)))
    with store.open_run(path) as run:
        assert len(Moments(run, by_hand.merging())) == 0  # averages need none
