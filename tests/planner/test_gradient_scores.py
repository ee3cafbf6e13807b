"""Scores from gradients: from written sums, and from a real backward against the published, two-pass form of HEAPr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from torch import Tensor

import planner.importance as importance
import profiler
import store
from moescope.errors import PlanError
from tests.profiler.capture.tiny import batch, build, recorded_calls

Array = NDArray[np.float64]

EXPERTS, WIDTH, UNUSED = 4, 6, 3


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, int, Array, Array]]:
    """(domain, expert, a, h) of an expert's tokens, (tokens, neurons) each; expert 3 is never used."""
    generator = np.random.default_rng(0)
    found = []
    for domain in ("code", "german"):
        for expert in range(UNUSED):
            count = 3 + 2 * expert + (domain == "code")
            found.append((domain, expert, generator.normal(size=(count, WIDTH)), generator.normal(size=(count, WIDTH))))
    return found


@pytest.fixture(scope="module")
def run(rows: list[tuple[str, int, Array, Array]], tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """A run that holds their sums, a shard per domain; vectors are kept per domain."""
    writer = store.RunWriter.create(tmp_path_factory.mktemp("gradients"), "sums", store.RunInfo(model="toy"))
    layer = {"layer": [2], "step": [0], "num_experts": [EXPERTS], "top_k": [2], "expert_width": [WIDTH]}
    for domain in ("code", "german"):
        neurons, experts = [], []
        for _, expert, a, h in (row for row in rows if row[0] == domain):
            key = {"layer": 2, "step": 0, "expert": expert, "kind": "routed", "domain": domain, "phase": "prompt"}
            key["tokens"] = len(a)
            sums = {
                "activation_square_sum": a**2,
                "gradient_square_sum": h**2,
                "product_sum": a * h,
                "product_square_sum": (a * h) ** 2,
            }
            neurons.append({**key, **{name: values.sum(0).tolist() for name, values in sums.items()}})
            token = (a * h).sum(1)
            experts.append({**key, "product_sum": token.sum(), "product_square_sum": (token**2).sum()})
        load = {"layer": [2], "step": [0], "domain": [domain], "phase": ["prompt"], "tokens": [10]}
        writer.write_shard(
            {
                "layer": pl.DataFrame(layer),
                "router_load": pl.DataFrame(load),
                "neuron_gradient": pl.DataFrame(neurons),
                "expert_gradient": pl.DataFrame(experts),
            }
        )
    return store.open_run(writer.finish(seconds=1.0))


def _heapr(a: Array, h: Array) -> Array:
    return np.asarray((a**2).mean(0) * (h**2).mean(0))


NEURONS: dict[str, tuple[dict[str, Any], Any]] = {
    "heapr": ({}, _heapr),
    "heapr total": ({"weighting": "total"}, lambda a, h: len(a) * _heapr(a, h)),
    "taylor": ({}, lambda a, h: np.abs((a * h).sum(0))),
    "fisher": ({}, lambda a, h: ((a * h) ** 2).sum(0)),
}
WHOLE = {
    "expert_taylor": lambda a, h: np.abs((a * h).sum()),
    "expert_fisher": lambda a, h: ((a * h).sum(1) ** 2).sum(),
}


def _of(rows: list[tuple[str, int, Array, Array]], domain: str | None, expert: int) -> tuple[Array, Array]:
    wanted = [row for row in rows if row[1] == expert and domain in (None, row[0])]
    return np.concatenate([row[2] for row in wanted]), np.concatenate([row[3] for row in wanted])


@pytest.mark.parametrize("domain", [None, "code"])
@pytest.mark.parametrize("name", NEURONS)
def test_scores_of_neurons(run: store.Run, rows: Any, name: str, domain: str | None) -> None:
    parameters, expected = NEURONS[name]
    frame = importance.score(run, name.split()[0], domain=domain, **parameters)
    assert frame.columns == [*importance.NEURON, "value"] and len(frame) == EXPERTS * WIDTH
    for expert in range(UNUSED):
        found = frame.filter(pl.col("expert") == expert).sort("neuron")["value"]
        assert_allclose(found, expected(*_of(rows, domain, expert)), rtol=1e-5)
    assert frame.filter(pl.col("expert") == UNUSED)["value"].to_list() == [0.0] * WIDTH


@pytest.mark.parametrize("domain", [None, "german"])
@pytest.mark.parametrize("name", WHOLE)
def test_scores_of_experts(run: store.Run, rows: Any, name: str, domain: str | None) -> None:
    values = importance.score(run, name, domain=domain)["value"].to_numpy()
    expected = [WHOLE[name](*_of(rows, domain, expert)) for expert in range(UNUSED)]
    assert_allclose(values, [*expected, 0.0], rtol=1e-6)


def test_an_unknown_weighting_is_refused(run: store.Run) -> None:
    with pytest.raises(PlanError, match="weighting 'sum' is not known: use mean or total"):
        importance.score(run, "heapr", weighting="sum")


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the next tokens, summed over pairs of real ones."""
    logits = model(**inputs).logits[:, :-1]
    mask = inputs["attention_mask"]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
    return (losses * mask[:, 1:] * mask[:, :-1]).sum()


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_one_pass_is_what_heapr_computes_in_two(family: str, tmp_path: Path) -> None:
    """mean(a^2) w' M w with M = mean(u u'), u = dL/df = g dL/dy, from the gradients of the layers' outputs."""
    model, inputs = build(family), batch()
    with profiler.watch(model, store=tmp_path, name="tiny", level="gradients") as session:
        _loss(model, inputs).backward()
    assert session.path is not None
    frame = importance.score(store.open_run(session.path), "heapr")

    slopes: dict[int, Tensor] = {}
    with recorded_calls(model) as calls:
        handles = [
            entry.layer.experts.register_forward_hook(lambda _, args, output, key=index: _keep(output, slopes, key))
            for index, entry in enumerate(calls)
        ]
        _loss(model, inputs).backward()
    for handle in handles:
        handle.remove()
    real = inputs["attention_mask"].reshape(-1).numpy() == 1
    for index, entry in enumerate(calls):
        layout = entry.layer.layout
        assert layout is not None
        ids, gate = entry.ids[0].numpy()[real], entry.weights[0].double().numpy()[real]
        activation, slope = entry.rows()[0][real], slopes[index].double().numpy()[real]
        for expert in np.unique(ids).tolist():
            token, slot = np.nonzero(ids == expert)
            output_slope = gate[token, slot][:, None] * slope[token]
            moment = output_slope.T @ output_slope / len(token)
            down = layout.down_weight(entry.layer.experts, expert).detach().double().numpy()
            expected = (activation[token, slot] ** 2).mean(0) * np.einsum("dk,de,ek->k", down, moment, down)
            place = {"layer": entry.layer.layer, "kind": "routed", "expert": expert}
            found = frame.filter(**place).sort("neuron")["value"].to_numpy()
            assert_allclose(found, expected, rtol=2e-3, atol=1e-4 * expected.max())
    kinds = {"routed", "shared"} if family == "qwen2_moe" else {"routed"}
    assert set(frame["kind"]) == kinds


def _keep(output: Tensor, slopes: dict[int, Tensor], key: int) -> None:
    flat = output.reshape(-1, output.shape[-1])
    flat.retain_grad()
    output.register_hook(lambda gradient: slopes.update({key: gradient.reshape(flat.shape)}))
