"""Every table of a run against the same figures computed token by token in float64 from what plain hooks saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from scipy.special import expit, logsumexp, softmax

import profiler
import store
from profiler.recorders.router import BINS, MARGIN_EDGES, edges_of
from tests.profiler.capture.tiny import FAST, Calls, batch, build, recorded_calls

DOMAINS = [["code", "code", "code"], ["german", "code", "german"]]
SHARED = ("qwen2_moe", "deepseek_v3")


@dataclass
class Case:
    """A run and, beside it, what happened."""

    run: store.Run
    calls: list[Calls]
    residual: dict[int, list[NDArray[np.float64]]]
    shared: dict[int, list[tuple[NDArray[np.float64], ...]]]
    real: list[NDArray[np.bool_]]
    domain: list[NDArray[Any]]
    sequence: list[NDArray[np.int64]]
    position: list[NDArray[np.int64]]

    def tokens(self, values: list[Any]) -> NDArray[Any]:
        """The entries of the real tokens, over all forwards."""
        return np.concatenate([np.asarray(part)[real] for part, real in zip(values, self.real, strict=True)])


@pytest.fixture(scope="module", params=FAST)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = build(request.param)
    batches = [batch(seed=1), batch(seed=2, padding="left")]
    residual: dict[int, list[NDArray[np.float64]]] = {index: [] for index in range(len(model.model.layers))}
    shared: dict[int, list[tuple[NDArray[np.float64], ...]]] = {index: [] for index in residual}
    handles = [_see_residual(layer, residual[index]) for index, layer in enumerate(model.model.layers)]
    if request.param in SHARED:
        handles += [_see_shared(layer.mlp, shared[index]) for index, layer in enumerate(model.model.layers)]
    with torch.no_grad(), recorded_calls(model) as calls:
        for inputs in batches:
            model(**inputs)
    for handle in handles:
        handle.remove()
    folder = tmp_path_factory.mktemp(request.param)
    with torch.no_grad(), profiler.watch(model, store=folder, name="tiny", level="activations") as session:
        for inputs, domains in zip(batches, DOMAINS, strict=True):
            session.label(domains=domains)
            model(**inputs)
            session.flush()  # sums and maxima of two shards must add up
    assert session.path is not None
    masks = [inputs["attention_mask"].numpy() for inputs in batches]
    return Case(
        run=store.open_run(session.path),
        calls=calls,
        residual=residual,
        shared=shared,
        real=[mask.reshape(-1) == 1 for mask in masks],
        domain=[np.repeat(domains, 12) for domains in DOMAINS],
        sequence=[np.repeat(np.arange(3) + 3 * index, 12) for index in range(2)],
        position=[(mask.cumsum(1) - 1).reshape(-1) for mask in masks],
    )


def _see_residual(layer: torch.nn.Module, kept: list[Any]) -> Any:
    def see(module: torch.nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden.double().reshape(-1, hidden.shape[-1]).numpy())

    return layer.register_forward_hook(see)


def _see_shared(block: Any, kept: list[Any]) -> Any:
    module = getattr(block, "shared_expert", None) or getattr(block, "shared_experts", None)
    if module is None:
        return block.register_forward_hook(lambda *_: None)

    def see(module: Any, args: Any, output: Any) -> None:
        hidden = args[0].double().reshape(-1, args[0].shape[-1])
        gate, up, down = (getattr(module, name).weight.double() for name in ("gate_proj", "up_proj", "down_proj"))
        activation = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
        scale = block.shared_expert_gate.weight.double() if hasattr(block, "shared_expert_gate") else None
        weight = torch.ones(len(hidden)) if scale is None else torch.sigmoid(hidden @ scale.T)[:, 0]
        kept.append((activation.numpy(), (activation @ down.T).numpy(), weight.numpy()))

    return module.register_forward_hook(see)


def _routing(case: Case, entry: Calls) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(tokens, k) ids and weights in descending weight."""
    ids, weights = (
        case.tokens([part.numpy() for part in entry.ids]),
        case.tokens([p.double().numpy() for p in entry.weights]),
    )
    order = np.argsort(-weights, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


def _probability(entry: Calls, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    if entry.layer.traits.score == "softmax":
        return softmax(logits, axis=1)
    score = expit(logits)
    return score / score.sum(1, keepdims=True)


def _layer(frame: pl.DataFrame, entry: Calls, domain: str, kind: str | None = "routed") -> pl.DataFrame:
    wanted = (pl.col("layer") == entry.layer.layer) & (pl.col("domain") == domain) & (pl.col("phase") == "prompt")
    if kind is not None:
        wanted &= pl.col("kind") == kind
    return frame.filter(wanted)


def test_expert_load(case: Case) -> None:
    table = case.run.table("expert_load")
    for entry in case.calls:
        ids, weights = _routing(case, entry)
        logits = case.tokens([part.double().numpy() for part in entry.logits])
        probability = _probability(entry, logits)
        for domain in ("code", "german"):
            of = case.tokens(case.domain) == domain
            starts = case.tokens(case.position)[of] == 0
            found = _layer(table, entry, domain).sort("expert")
            size = entry.layer.num_experts
            assert found["expert"].to_list() == list(range(size))
            chosen, gate = ids[of], weights[of]
            share = gate / gate.sum(1, keepdims=True)
            expected = {
                "tokens": np.bincount(chosen.ravel(), minlength=size),
                "first_choices": np.bincount(chosen[:, 0], minlength=size),
                "first_positions": np.bincount(chosen[starts].ravel(), minlength=size),
                "gate_sum": np.bincount(chosen.ravel(), gate.ravel(), size),
                "gate_square_sum": np.bincount(chosen.ravel(), gate.ravel() ** 2, size),
                "gate_share_sum": np.bincount(chosen.ravel(), share.ravel(), size),
                "probability_sum": probability[of].sum(0),
                "logit_sum": logits[of].sum(0),
                "logit_square_sum": (logits[of] ** 2).sum(0),
            }
            for column, values in expected.items():
                assert_allclose(found[column].to_numpy(), values, rtol=1e-5, atol=1e-4, err_msg=column)


def _quantities(case: Case, entry: Calls) -> dict[str, NDArray[np.float64]]:
    ids, weights = _routing(case, entry)
    logits = case.tokens([part.double().numpy() for part in entry.logits])
    probability = _probability(entry, logits)
    ordered = -np.sort(-logits, axis=1)
    share = weights / weights.sum(1, keepdims=True)
    k = ids.shape[1]
    return {
        "entropy": -(probability * np.log(probability)).sum(1),
        "top_probability": probability.max(1),
        "selected_probability": np.take_along_axis(probability, ids, 1).sum(1),
        "first_margin": ordered[:, 0] - ordered[:, 1],
        "boundary_margin": ordered[:, k - 1] - ordered[:, k],
        "weight_entropy": -(share * np.log(share)).sum(1),
        "log_partition_square": logsumexp(logits, axis=1) ** 2,
    }


def test_router_load(case: Case) -> None:
    table = case.run.table("router_load")
    for entry in case.calls:
        values = _quantities(case, entry)
        for domain in ("code", "german"):
            of = case.tokens(case.domain) == domain
            row = _layer(table, entry, domain, None).to_dicts()[0]
            assert row["tokens"] == row["logit_tokens"] == of.sum()
            assert row["nonfinite_tokens"] == 0
            assert row["selections"] == of.sum() * entry.layer.top_k
            for name, value in values.items():
                assert row[f"{name}_sum"] == pytest.approx(value[of].sum(), rel=1e-5, abs=1e-4), name
            assert row["boundary_ties"] == (values["boundary_margin"][of] == 0).sum()


def test_router_histogram(case: Case) -> None:
    table = case.run.table("router_histogram")
    for entry in case.calls:
        values = _quantities(case, entry)
        for quantity in ("entropy", "top_probability", "selected_probability", "first_margin", "boundary_margin"):
            edges = np.array(edges_of(quantity, entry.layer.num_experts))
            for domain in ("code", "german"):
                of = case.tokens(case.domain) == domain
                found = _layer(table, entry, domain, None).filter(pl.col("quantity") == quantity)
                counts = np.zeros(len(edges) - 1)
                counts[np.searchsorted(edges, found["lower"].to_numpy() + 1e-12, side="right") - 1] = found["tokens"]
                inside = np.clip(values[quantity][of], edges[0], edges[-1] - 1e-9)
                expected = np.histogram(inside, edges)[0]
                # Rounding may move a token over an edge, no more.
                assert counts.sum() == expected.sum()
                assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 1


def test_expert_output(case: Case) -> None:
    table = case.run.table("expert_output")
    sequence, position, domains = (case.tokens(part) for part in (case.sequence, case.position, case.domain))
    for entry in case.calls:
        rows = [entry.rows(call) for call in range(len(entry.ids))]
        activation, output = (case.tokens([row[index] for row in rows]) for index in (0, 1))
        ids = case.tokens([part.numpy() for part in entry.ids])
        gate = case.tokens([part.double().numpy() for part in entry.weights])
        for domain in ("code", "german"):
            found = {row["expert"]: row for row in _layer(table, entry, domain).to_dicts()}
            used = np.unique(ids[domains == domain])
            assert set(found) == set(used.tolist())
            for expert in used:
                token, slot = np.nonzero((ids == expert) & (domains == domain)[:, None])
                _assert_output(found[expert], activation[token, slot], output[token, slot], gate[token, slot])
                row = found[expert]
                place = np.abs(output[token, slot]).max(1).argmax()
                assert (row["output_max_sequence"], row["output_max_position"]) == (
                    sequence[token][place],
                    position[token][place],
                )
                assert row["output_max_channel"] == np.abs(output[token, slot])[place].argmax()
                # The first token of each sequence that used the expert, whatever its domain.
                first = [token[sequence[token] == number][0] for number in np.unique(sequence[token])]
                largest = max(np.abs(output[token, slot])[token == start].max() for start in first)
                assert row["first_routed_output_max"] == pytest.approx(largest, rel=1e-4)


def _assert_output(
    row: dict[str, Any], activation: NDArray[np.float64], output: NDArray[np.float64], gate: NDArray[np.float64]
) -> None:
    norm = np.linalg.norm(output, axis=1)
    assert row["tokens"] == len(norm)
    expected = {
        "norm_sum": norm.sum(),
        "norm_square_sum": (norm**2).sum(),
        "gated_norm_sum": (gate * norm).sum(),
        "gated_norm_square_sum": ((gate * norm) ** 2).sum(),
        "output_max": np.abs(output).max(),
        "gated_output_max": (gate[:, None] * np.abs(output)).max(),
        "input_max": np.abs(activation).max(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-4), name


def test_neuron_activation(case: Case) -> None:
    table = case.run.table("neuron_activation").filter(pl.col("kind") == "routed")
    for entry in case.calls:
        activation = case.tokens([entry.rows(call)[0] for call in range(len(entry.ids))])
        ids = case.tokens([part.numpy() for part in entry.ids])
        rows = table.filter(pl.col("layer") == entry.layer.layer).to_dicts()
        assert {row["expert"] for row in rows} == set(np.unique(ids).tolist())
        for row in rows:
            selected = activation[ids == row["expert"]]
            assert row["tokens"] == len(selected)
            assert_allclose(row["square_sum"], (selected**2).sum(0), rtol=1e-3, atol=1e-5)


def test_residual(case: Case) -> None:
    table = case.run.table("residual")
    domains, position, sequence = (case.tokens(part) for part in (case.domain, case.position, case.sequence))
    assert table["layer"].unique().sort().to_list() == list(case.residual)
    for layer, parts in case.residual.items():
        hidden = case.tokens(parts)
        for domain in ("code", "german"):
            of = domains == domain
            row = table.filter((pl.col("layer") == layer) & (pl.col("domain") == domain)).to_dicts()[0]
            size = np.abs(hidden[of])
            place = size.max(1).argmax()
            assert row["tokens"] == of.sum()
            assert row["norm_sum"] == pytest.approx(np.linalg.norm(hidden[of], axis=1).sum(), rel=1e-5)
            assert row["absolute_max"] == pytest.approx(size.max(), rel=1e-5)
            assert (row["sequence"], row["position"]) == (sequence[of][place], position[of][place])
            assert row["channel"] == size[place].argmax()
            assert row["median_there"] == pytest.approx(np.sort(size[place])[(size.shape[1] - 1) // 2], rel=1e-4)
            assert row["later_max"] == pytest.approx(size[position[of] > 0].max(), rel=1e-5)


def test_shared_experts_stand_apart(case: Case) -> None:
    outputs = case.run.table("expert_output").filter(pl.col("kind") == "shared")
    neurons = case.run.table("neuron_activation").filter(pl.col("kind") == "shared")
    assert case.run.table("expert_load").filter(pl.col("kind") == "shared").is_empty()
    domains = case.tokens(case.domain)
    present = {layer: parts for layer, parts in case.shared.items() if parts}
    assert outputs["layer"].unique().sort().to_list() == sorted(present)
    for layer, parts in present.items():
        activation, output, gate = (case.tokens([part[index] for part in parts]) for index in range(3))
        row = neurons.filter(pl.col("layer") == layer).to_dicts()[0]
        assert_allclose(row["square_sum"], (activation**2).sum(0), rtol=1e-3, atol=1e-5)
        for domain in ("code", "german"):
            of = domains == domain
            found = outputs.filter((pl.col("layer") == layer) & (pl.col("domain") == domain)).to_dicts()
            assert [row["expert"] for row in found] == [0]
            _assert_output(found[0], activation[of], output[of], gate[of])


def test_bins_are_what_the_module_documents() -> None:
    assert len(edges_of("entropy", 8)) == BINS + 1
    assert edges_of("top_probability", 8)[-1] == 1.0
    assert tuple(edges_of("first_margin", 8)) == MARGIN_EDGES
    assert len(MARGIN_EDGES) <= BINS


def test_trace_and_load_tell_the_same(case: Case) -> None:
    trace = case.run.selections()
    load = case.run.table("expert_load").group_by("layer", "expert").agg(pl.col("tokens").sum())
    for axis, (layer, _) in enumerate(trace.layers):
        ids = trace.ids[axis]
        counts = np.bincount(ids[ids >= 0])
        found = load.filter(pl.col("layer") == layer).sort("expert")["tokens"].to_numpy()
        assert_array_equal(found[: len(counts)], counts)
