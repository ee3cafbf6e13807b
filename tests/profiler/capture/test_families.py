"""Every family: captured as it runs, with unchanged outputs, all tables equal to a float64 recomputation; or refused.

One model per family sees a batch padded on the right, one padded on the left, and a generation in which rows end early.
Counts are equal; sums and maxima agree to 1e-4, for signed sums relative to the sum of their absolute values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import transformers
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

import profiler
import store
from moescope.errors import ModelError
from tests.profiler.capture.plain_hooks import hooked
from tests.profiler.capture.reference import Fed, Reference
from tests.profiler.capture.tiny import REFUSED, WATCHED, batch, build, output_of

ANSWER = torch.tensor([[5, 6, 7, 8], [9, 2, 0, 0], [2, 0, 0, 0]])
"""What each row says, whatever the model thinks: the second ends (token 2) after one token, the third at once."""

NO_CACHE = ("openai_privacy_filter",)
"""Families that read all tokens at once and never generate."""


class _Forced(transformers.LogitsProcessor):
    """Says the answer."""

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = ANSWER[:, min(input_ids.shape[1] - self._prompt, ANSWER.shape[1] - 1)]
        return torch.full_like(scores, -torch.inf).scatter(1, said[:, None], 0.0)


def feed(model: Any, session: Any = None) -> list[Tensor]:
    """The three parts of the text, labelled by how they are padded; returns what the model put out."""
    outputs = []
    for padding in ("right", "left"):
        if session is not None:
            session.label(domains=padding)
        outputs.append(output_of(model(**batch(padding=padding))))
    if model.config.model_type in NO_CACHE:
        return outputs
    if session is not None:
        session.label(domains="answer")
    inputs = batch(padding="left", seed=2)
    if model.can_generate():
        forced = transformers.LogitsProcessorList([_Forced(inputs["input_ids"].shape[1])])
        model.generate(**inputs, max_new_tokens=ANSWER.shape[1], do_sample=False, logits_processor=forced)
        return outputs
    mask, past = inputs["attention_mask"], None
    ids = inputs["input_ids"]
    for place in range(ANSWER.shape[1]):
        result = model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True)
        ids, past = ANSWER[:, place : place + 1], result.past_key_values
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return outputs


def fed_tokens(model: Any) -> list[Fed]:
    """What :func:`feed` has fed, forward by forward."""
    parts, sequence = [], 0
    for domain, inputs in (
        ("right", batch(padding="right")),
        ("left", batch(padding="left")),
        ("answer", batch(padding="left", seed=2)),
    ):
        if domain == "answer" and model.config.model_type in NO_CACHE:
            break
        mask = inputs["attention_mask"].numpy()
        rows, length = mask.shape
        numbers = np.repeat(np.arange(sequence, sequence + rows), length)
        parts.append(Fed(mask.ravel() == 1, domain, "prompt", numbers, (mask.cumsum(1) - 1).ravel()))
        sequence += rows
    if parts[-1].domain == "answer":
        ended = (ANSWER == 2).cumsum(1).numpy() > 0
        for place in range(ANSWER.shape[1] - 1):  # the last token is never fed
            numbers = np.arange(sequence - 3, sequence)
            parts.append(Fed(~ended[:, place], "answer", "decode", numbers, mask.sum(1) + place))
    return parts


@pytest.mark.parametrize("family", WATCHED)
def test_every_table_equals_an_independent_computation(family: str, tmp_path: Path) -> None:
    model = build(family)
    with torch.no_grad(), hooked(model) as seen:
        bare = feed(model)
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        watched = feed(model, session)
    assert all(torch.equal(*pair) for pair in zip(bare, watched, strict=True))
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    fed = fed_tokens(model)
    assert run.info.tokens == sum(part.real.sum() for part in fed)
    tables = {name: run.table(name) for name in TABLES}
    for entry in seen:
        reference = Reference(entry, fed)
        assert_allclose(reference.total, reference.result, rtol=1e-3, atol=1e-4 * np.abs(reference.result).max())
        of_layer = (pl.col("layer") == entry.layer.layer) & (pl.col("step") == entry.layer.step)
        parts = {name: frame.filter(of_layer) for name, frame in tables.items()}
        _check_trace(run, reference)
        _check_scalars(reference, parts)
        _check_vectors(reference, parts)
        _check_moe_output(reference, parts["moe_output"])
        _check_shared(reference, parts)


TABLES = (
    "expert_load",
    "expert_rank",
    "expert_output",
    "moe_output",
    "neuron_activation",
    "expert_vector",
    "expert_pair",
)


def _check_trace(run: store.Run, reference: Reference) -> None:
    trace = run.selections(layers=[reference.layer.layer])
    axis = trace.layers.index(reference.layer.key)
    assert_array_equal(trace.ids[axis][reference.sequence, reference.position], reference.ids)
    allowed = np.abs(reference.gate).max() / 509  # half a step of 8 bits
    assert_allclose(trace.weights[axis][reference.sequence, reference.position], reference.gate, atol=allowed)


def _check_scalars(reference: Reference, parts: dict[str, pl.DataFrame]) -> None:
    load, rank = reference.expert_load(), reference.expert_rank()
    sums, maxima = reference.expert_output()
    for domain, phase in sorted(set(zip(reference.domain, reference.phase, strict=True))):
        chosen = (reference.domain == domain) & (reference.phase == phase)
        of_group = (pl.col("domain") == domain) & (pl.col("phase") == phase)
        groups = {name: frame.filter(of_group) for name, frame in parts.items() if name in TABLES[:3]}
        found = groups["expert_load"].filter(pl.col("kind") == "routed").sort("expert")
        assert found["expert"].to_list() == list(range(reference.num_experts))
        for column, values in load.items():
            _close(found[column].to_numpy(), values[chosen], f"{domain} {phase} {column}")
        found = groups["expert_rank"].sort("expert")
        for column, values in rank.items():
            _close(np.array(found[column].to_list()), values[chosen], f"{domain} {phase} {column}")
        _check_confidence(reference, found, chosen)
        found = groups["expert_output"].filter(pl.col("kind") == "routed").sort("expert")
        used = reference.hot()[chosen].sum(0)
        assert found["expert"].to_list() == np.flatnonzero(used).tolist()
        assert_array_equal(found["tokens"].to_numpy(), used[used > 0])
        for column, values in sums.items():
            # 1 - cos(r, r + y) is a difference of numbers near 1, and as exact as those
            slack = 1e-6 * sums["gated_norm_sum"][chosen].sum(0)[used > 0] if column.startswith("shifted") else 0.0
            _close(found[column].to_numpy(), values[chosen][:, used > 0], f"{domain} {phase} {column}", slack)
        for column, values in maxima.items():
            assert_allclose(found[column].to_numpy(), values[chosen].max(0)[used > 0], rtol=1e-4, err_msg=column)


def _check_confidence(reference: Reference, found: pl.DataFrame, chosen: np.ndarray) -> None:
    """Counts per eighth of the confidence; rounding may move a selection over an edge, no more."""
    if "logit_sum" not in reference.expert_rank():
        return
    confidence = reference.confidence[chosen]
    eighths = np.array(found["confidence_tokens"].to_list())
    assert_array_equal(eighths.sum(1), reference.hot()[chosen].sum(0))
    edges = np.minimum((confidence * 8).astype(int), 7)[reference.ids[chosen] >= 0]
    assert np.abs(np.cumsum(eighths.sum(0)) - np.cumsum(np.bincount(edges, minlength=8))).max() <= 1
    assert_allclose(
        np.array(found["confidence_logit_sum"].to_list()).sum(1),
        np.array(found["logit_sum"].to_list()).sum(1),
        rtol=1e-6,
        atol=1e-6,
    )


def _check_vectors(reference: Reference, parts: dict[str, pl.DataFrame]) -> None:
    for phase in sorted(set(reference.phase)):
        chosen = reference.phase == phase
        used = reference.hot()[chosen].sum(0)
        for table in ("neuron_activation", "expert_vector"):
            expected = getattr(reference, table)(chosen)
            absolute = expected
            if table == "expert_vector":
                absolute = {name: np.sqrt(len(chosen) * np.abs(values).max()) for name, values in expected.items()}
            found = parts[table].filter((pl.col("phase") == phase) & (pl.col("kind") == "routed")).sort("expert")
            assert found["expert"].to_list() == np.flatnonzero(used).tolist()
            assert_array_equal(found["tokens"].to_numpy(), used[used > 0])
            for column, values in expected.items():
                actual = np.array(found[column].to_list())
                slack = 1e-5 * np.max(absolute[column])
                assert_allclose(actual, values[used > 0], rtol=1e-4, atol=slack, err_msg=f"{table} {column}")
        found = parts["expert_pair"].filter(pl.col("phase") == phase).sort("expert")
        for column, values in reference.expert_pair(chosen).items():
            actual = np.array(found[column].to_list())
            exact = column == "selections"
            assert_allclose(actual, values, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5 * np.abs(values).max())


def _check_moe_output(reference: Reference, frame: pl.DataFrame) -> None:
    for domain, phase in sorted(set(zip(reference.domain, reference.phase, strict=True))):
        chosen = (reference.domain == domain) & (reference.phase == phase)
        row = frame.filter((pl.col("domain") == domain) & (pl.col("phase") == phase)).to_dicts()[0]
        expected = reference.moe_output(chosen)
        assert row["residual_tokens"] == expected.get("residual_tokens", 0), reference.layer.name
        for column, value in expected.items():
            assert row[column] == pytest.approx(value, rel=1e-4), column


def _check_shared(reference: Reference, parts: dict[str, pl.DataFrame]) -> None:
    """Shared experts stand apart as one expert of kind "shared"."""
    output, activation, gate = reference.shared
    rows = {name: parts[name].filter(kind="shared") for name in ("expert_output", "neuron_activation", "expert_vector")}
    if output is None:
        assert all(frame.is_empty() for frame in rows.values())
        return
    norm = np.linalg.norm(output, axis=1)
    gate = np.ones(len(norm)) if gate is None else gate
    for row in rows["expert_output"].to_dicts():
        chosen = (reference.domain == row["domain"]) & (reference.phase == row["phase"])
        assert (row["expert"], row["tokens"]) == (0, chosen.sum())
        assert row["norm_sum"] == pytest.approx(norm[chosen].sum(), rel=1e-4)
        assert row["gated_norm_sum"] == pytest.approx((gate * norm)[chosen].sum(), rel=1e-4)
        assert row["output_max"] == pytest.approx(np.abs(output[chosen]).max(), rel=1e-4)
    for row in rows["expert_vector"].to_dicts():
        chosen = reference.phase == row["phase"]
        assert_allclose(row["output_sum"], output[chosen].sum(0), rtol=1e-4, atol=1e-4 * np.abs(output).max())
    for row in rows["neuron_activation"].to_dicts():
        chosen = reference.phase == row["phase"]
        assert activation is not None
        expected = (gate[:, None] * np.abs(activation))[chosen]
        assert_allclose(row["gated_absolute_sum"], expected.sum(0), rtol=1e-4, atol=1e-6)
        assert_allclose(row["gated_absolute_max"], expected.max(0), rtol=1e-4, atol=1e-6)
    assert len(rows["expert_output"]) == len(set(zip(reference.domain, reference.phase, strict=True)))


def _close(found: np.ndarray, parts: np.ndarray, name: str, slack: Any = 0.0) -> None:
    """Sums over tokens to 1e-4, relative to the sum of absolute values."""
    expected, scale = parts.sum(0), np.abs(parts).sum(0)
    wrong = np.abs(found - expected) > 1e-4 * scale + slack
    assert not wrong.any(), (name, found[wrong], expected[wrong])


@pytest.mark.parametrize("family", WATCHED)
def test_in_bfloat16_selections_are_exact_and_norms_to_one_percent(family: str, tmp_path: Path) -> None:
    """The reference runs in float64 on bfloat16 inputs and weights; the model rounds what is inside to 8 bits."""
    model, inputs = build(family, dtype=torch.bfloat16), batch(2, 8, padding="left")
    with torch.no_grad(), hooked(model) as seen:
        bare = output_of(model(**inputs))
    session = profiler.watch(model, store=tmp_path, name="tiny", level="activations")
    with torch.no_grad(), session.attached():
        watched = output_of(model(**inputs))
    assert torch.equal(bare, watched)
    session.flush(final=True)
    run = store.open_run(session.writer.folder)  # its shards: to finish the file would take as long as all the rest
    assert not [row for row in run.table("check").to_dicts() if row["status"] == "fail"], run.badge.reasons
    mask = inputs["attention_mask"].numpy()
    fed = Fed(mask.ravel() == 1, "text", "prompt", np.repeat([0, 1], 8), (mask.cumsum(1) - 1).ravel())
    load, outputs, neurons = (run.table(name) for name in ("expert_load", "expert_output", "neuron_activation"))
    for entry in seen:
        reference = Reference(entry, [fed])
        _check_trace(run, reference)
        routed = (pl.col("layer") == entry.layer.layer) & (pl.col("step") == entry.layer.step)
        routed &= pl.col("kind") == "routed"
        counts = reference.hot().sum(0)
        assert_array_equal(load.filter(routed).sort("expert")["tokens"].to_numpy(), counts)
        found, sums = outputs.filter(routed).sort("expert"), reference.expert_output()[0]
        assert found["expert"].to_list() == np.flatnonzero(counts).tolist()
        for column in ("norm_sum", "gated_norm_sum"):
            assert_allclose(found[column].to_numpy(), sums[column].sum(0)[counts > 0], rtol=1e-2, err_msg=column)
        squares = reference.neuron_activation(np.ones(len(reference.ids), bool))["square_sum"].sum(1)
        found = neurons.filter(routed).sort("expert")["square_sum"]
        assert_allclose([sum(row) for row in found.to_list()], squares[counts > 0], rtol=2e-2)


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_are_named(family: str) -> None:
    with pytest.raises(ModelError, match="layer .* cannot be watched"):
        profiler.find_moe_layers(build(family))


def test_nllb_is_refused_because_it_runs_the_wrong_experts() -> None:
    with pytest.raises(ModelError, match="runs the wrong experts"):
        profiler.find_moe_layers(build("nllb-moe"))
