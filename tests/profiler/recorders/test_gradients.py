"""Level ``gradients`` against autograd on explicit masks of each token, and against HEAPr's matrix by brute force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from polars.testing import assert_frame_equal
from torch import Tensor

import profiler
import profiler.collect as collect_module
import store
from moescope.errors import InputError, ModelError, RunError
from profiler.capture.backward import forward_backward
from profiler.capture.discovery import MoELayer, find_moe_layers
from profiler.corpus import Corpus, open_corpus
from profiler.recorders.gradients import _reduce
from tests.profiler.capture.tiny import batch, build, tokenizer

FAMILIES = ("olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss")
DOMAINS = [["code", "code", "code"], ["german", "code", "german"]]
BATCHES = [batch(seed=1), batch(seed=2, padding="left")]
TABLES = ("neuron_gradient", "expert_gradient", "loss", "expert_load", "sequence")


@dataclass
class Row:
    """One (token, expert): leaves of the graph, whose ``grad`` the backward fills."""

    token: int
    expert: int
    activation: Tensor
    mask: Tensor
    output: Tensor | None


@dataclass
class Twin:
    """A float64 copy of a model whose experts run one by one, each neuron behind a mask of ones."""

    model: Any
    rows: dict[tuple[int, str], list[Row]] = field(default_factory=dict)
    loss: float = 0.0

    def run(self, inputs: dict[str, Tensor]) -> None:
        """Forward and backward of the summed next-token loss, by the library's own cross-entropy."""
        logits = self.model(**inputs, use_cache=False).logits
        real = inputs["attention_mask"] == 1
        pairs = real[:, :-1] & real[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1][pairs], inputs["input_ids"][:, 1:][pairs], reduction="sum"
        )
        loss.backward()
        self.loss = float(loss.detach())


def twin_of(model: Any) -> Twin:
    twin = Twin(copy.deepcopy(model).double())
    for layer in find_moe_layers(twin.model):
        layer.experts.forward = _loop(layer, twin.rows.setdefault((layer.layer, "routed"), []))
        if layer.shared is not None:
            layer.shared.down.register_forward_pre_hook(_mask(twin.rows.setdefault((layer.layer, "shared"), [])))
    return twin


def _loop(layer: MoELayer, rows: list[Row]) -> Callable[..., Tensor]:
    layout = layer.layout
    experts: Any = layer.experts
    assert layout is not None

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden, ids, weights = (*args, *kwargs.values())[:3]
        results = []
        for token, (chosen, gates) in enumerate(zip(ids.tolist(), weights, strict=True)):
            total = torch.zeros_like(hidden[token])
            for expert, gate in zip(chosen, gates, strict=True):
                first = hidden[token] @ layout.up_weight(experts, expert).T
                bias = layout.bias(experts, layout.up_name, expert)
                activation = experts._apply_gate((first if bias is None else first + bias)[None])[0]
                mask = torch.ones_like(activation, requires_grad=True)
                output = (activation * mask) @ layout.down_weight(experts, expert).T
                bias = layout.bias(experts, layout.down_name, expert)
                output = output if bias is None else output + bias
                activation.retain_grad()
                output.retain_grad()
                rows.append(Row(token, expert, activation, mask, output))
                total = total + gate * output
            results.append(total)
        return torch.stack(results)

    return forward


def _mask(rows: list[Row]) -> Callable[..., Any]:
    def mask_neurons(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        masked = []
        for token, activation in enumerate(args[0].reshape(-1, args[0].shape[-1])):
            mask = torch.ones_like(activation, requires_grad=True)
            activation.retain_grad()
            rows.append(Row(token, 0, activation, mask, None))
            masked.append(activation * mask)
        return (torch.stack(masked).reshape(args[0].shape),)

    return mask_neurons


@dataclass
class Case:
    """A run of two batches in two shards, and what brute force says about the same."""

    run: store.Run
    model: Any
    rows: dict[tuple[int, str], list[tuple[int, str, Row]]]

    def of(self, layer: int, kind: str, expert: int, domain: str | None = None) -> list[Row]:
        """The rows of real tokens that an expert saw."""
        rows = self.rows[layer, kind]
        return [row for _, name, row in rows if row.expert == expert and domain in (None, name)]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = build(request.param)
    path = _watched(model, tmp_path_factory.mktemp(request.param))
    rows: dict[tuple[int, str], list[tuple[int, str, Row]]] = {}
    for number, (inputs, domains) in enumerate(zip(BATCHES, DOMAINS, strict=True)):
        twin = twin_of(model)
        twin.run(inputs)
        real = inputs["attention_mask"].reshape(-1).tolist()
        for key, found in twin.rows.items():
            kept = [(number, domains[row.token // 12], row) for row in found if real[row.token]]
            rows.setdefault(key, []).extend(kept)
    return Case(store.open_run(path), model, rows)


def _watched(model: Any, folder: Path) -> Path:
    with profiler.watch(model, store=folder, name="tiny", level="gradients") as session:
        for inputs, domains in zip(BATCHES, DOMAINS, strict=True):
            session.label(domains=domains)
            with session.holding():
                forward_backward(model, inputs["input_ids"], inputs["attention_mask"])
            session.flush()  # two shards must add up
    assert session.path is not None
    return session.path


def _stack(values: list[Tensor | None]) -> NDArray[np.float64]:
    return np.stack([value.detach().numpy() for value in values if value is not None])


def _close(found: Any, expected: NDArray[np.float64]) -> None:
    assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_neurons_equal_autograd_on_masks(case: Case) -> None:
    table = case.run.table("neuron_gradient")
    kinds = {kind for _, kind in case.rows}
    assert set(table["kind"].unique()) == kinds
    for layer, kind in case.rows:
        frame = table.filter((pl.col("layer") == layer) & (pl.col("kind") == kind))
        assert set(frame["expert"]) == {row.expert for _, _, row in case.rows[layer, kind]}
        for row in frame.to_dicts():
            rows = case.of(layer, kind, row["expert"])
            activation = _stack([part.activation for part in rows])
            gradient = _stack([part.activation.grad for part in rows])
            masked = _stack([part.mask.grad for part in rows])
            assert row["tokens"] == len(rows)
            assert (row["domain"], row["phase"]) == ("", "prompt")
            _close(row["activation_square_sum"], (activation**2).sum(0))
            _close(row["gradient_square_sum"], (gradient**2).sum(0))
            _close(row["product_square_sum"], (masked**2).sum(0))
            # What cancels in the sum does not cancel in the rounding of its parts.
            assert_allclose(row["product_sum"], masked.sum(0), rtol=1e-4, atol=1e-4 * np.abs(masked).sum(0).max())


def test_two_sums_give_the_score_of_heapr(case: Case) -> None:
    for layer in find_moe_layers(case.model):
        assert layer.layout is not None
        frame = case.run.table("neuron_gradient").filter(layer=layer.layer, kind="routed")
        for row in frame.to_dicts():
            rows = case.of(layer.layer, "routed", row["expert"])
            slopes = _stack([None if part.output is None else part.output.grad for part in rows])
            moment = slopes.T @ slopes / len(rows)  # M = mean(u u^T), hidden x hidden
            down = layer.layout.down_weight(layer.experts, row["expert"]).detach().double().numpy()
            quadratic = np.einsum("ik,ij,jk->k", down, moment, down)
            score = (_stack([part.activation for part in rows]) ** 2).mean(0) * quadratic
            means = [np.array(row[name]) / row["tokens"] for name in ("activation_square_sum", "gradient_square_sum")]
            _close(means[0] * means[1], score)


def test_experts_equal_autograd_on_masks_per_domain(case: Case) -> None:
    table = case.run.table("expert_gradient")
    for layer, kind in case.rows:
        for row in table.filter((pl.col("layer") == layer) & (pl.col("kind") == kind)).to_dicts():
            rows = case.of(layer, kind, row["expert"], row["domain"])
            parts = _stack([part.mask.grad for part in rows])
            products, sizes = parts.sum(1), np.abs(parts).sum(1)  # neurons cancel, their rounding does not
            assert row["tokens"] == len(rows)
            assert row["product_sum"] == pytest.approx(products.sum(), abs=1e-4 * sizes.sum())
            assert row["product_square_sum"] == pytest.approx((products**2).sum(), abs=1e-4 * (sizes**2).sum())
    counted = table.group_by("layer", "kind").agg(pl.col("tokens").sum())
    assert {(row[0], row[1]): row[2] for row in counted.rows()} == {key: len(rows) for key, rows in case.rows.items()}


def test_the_other_backend_and_rows_without_padding_say_the_same(case: Case, tmp_path: Path) -> None:
    model = copy.deepcopy(case.model)
    model.set_experts_implementation("batched_mm")  # rows come token by token there
    with profiler.watch(model, store=tmp_path, name="alone", level="gradients") as session:
        for inputs in BATCHES:
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                alone = ids[mask == 1][None]
                with session.holding():
                    forward_backward(model, alone, torch.ones_like(alone))
    assert session.path is not None
    found = store.open_run(session.path).table("neuron_gradient")
    expected = case.run.table("neuron_gradient")
    assert_frame_equal(found.drop("product_sum"), expected.drop("product_sum"), rel_tol=1e-3, abs_tol=1e-4)


def test_a_mean_loss_differs_by_a_constant_factor(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="none")
    with profiler.watch(model, store=tmp_path, name="mean", level="gradients") as session:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()  # any loop's own loss, weights not frozen
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reason
    assert run.table("loss").is_empty()
    predictions = 3 * 11
    with profiler.watch(model, store=tmp_path, name="sum", level="gradients") as session, session.holding():
        forward_backward(model, inputs["input_ids"], inputs["attention_mask"])
    assert session.path is not None
    summed = store.open_run(session.path).table("neuron_gradient")
    for mean, whole in zip(run.table("neuron_gradient").to_dicts(), summed.to_dicts(), strict=True):
        _close(np.array(mean["gradient_square_sum"]) * predictions**2, np.array(whole["gradient_square_sum"]))


def test_a_loop_without_backward_is_told(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="none", level="gradients") as session:
        model(**batch())
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "warning"
    assert "4 of 4 calls of experts got no gradient" in run.badge.reason
    assert run.table("neuron_gradient").is_empty()


def test_a_broken_token_leaves_the_others_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    a, h = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    h[1] = torch.nan
    h[3, 0] = torch.inf
    sums, per_row = _reduce(a, h, torch.tensor([2, 0, 3]))
    sound = torch.where(torch.isfinite(h), h, 0)
    expected = [(a[2:] ** 2).sum(0), (sound[2:] ** 2).sum(0), (a * sound)[2:].sum(0), ((a * sound)[2:] ** 2).sum(0)]
    torch.testing.assert_close(sums[:, 2], torch.stack(expected))
    torch.testing.assert_close(per_row, (a * sound).sum(1))
    assert not sums[:, 1].any()


# From text to a run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "code.txt").write_text("def f(x):\n    return x + 1\n\n" * 20)
    (tmp_path / "english.txt").write_text("It was a bright cold day in April.\n\n" * 20)
    return tmp_path


def _corpus(texts: Path) -> Corpus:
    options: dict[str, Any] = {"sequence_length": 32, "batch_size": 4, "token_budget": 500}
    return open_corpus([texts / "code.txt", texts / "english.txt"], tokenizer=tokenizer(), **options)


def _collect(model: Any, texts: Path, name: str, **options: Any) -> Path:
    return collect_module.collect(
        model,
        corpus=_corpus(texts),
        store=texts,
        name=name,
        tokenizer=tokenizer(),
        level="gradients",
        headline=False,
        **options,
    )


def test_collect_records_the_plain_models_loss_and_leaves_no_trace(texts: Path) -> None:
    model = build("qwen2_moe").train()
    frozen = model.lm_head.weight.requires_grad_(False)
    run = store.open_run(_collect(model, texts, "loss", measure_overhead=True))
    assert run.badge.status == "valid", run.badge.reason
    assert model.training
    assert not frozen.requires_grad
    assert all(weight.requires_grad == (weight is not frozen) for weight in model.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    model.eval()
    expected: dict[str, list[float]] = {}
    for part in _corpus(texts).batches(skip=set()):
        ids, mask = torch.from_numpy(part.input_ids).long(), torch.from_numpy(part.attention_mask)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits.double()
        for row, domain in enumerate(part.domains):
            length = int(mask[row].sum())
            probability = torch.softmax(logits[row, : length - 1], -1)
            picked = probability[torch.arange(length - 1), ids[row, 1:length]]
            expected.setdefault(domain, []).extend((-picked.log()).tolist())
    table = {row["domain"]: row for row in run.table("loss").to_dicts()}
    assert set(table) == set(expected) == {"code", "english"}
    for domain, losses in expected.items():
        assert table[domain]["predictions"] == len(losses)
        assert table[domain]["loss_sum"] == pytest.approx(sum(losses), rel=1e-5)
    checks = {row["name"]: row for row in run.table("check").to_dicts()}
    assert (checks["loss unchanged"]["status"], checks["loss unchanged"]["value"]) == ("pass", 0)
    assert checks["outputs unchanged"]["status"] == "skipped"
    assert "loss is compared" in checks["outputs unchanged"]["detail"]


def test_an_interrupt_in_the_backward_takes_the_whole_batch_back(texts: Path) -> None:
    model = build("deepseek_v3")
    whole = store.open_run(_collect(model, texts, "whole"))
    seen: list[int] = []

    def interrupt(gradient: Tensor) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    def watch_backward(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(interrupt)

    handle = model.model.layers[2].register_forward_hook(watch_backward)  # layer 3 has its gradients by then
    with pytest.raises(RunError, match="was interrupted"):
        _collect(model, texts, "parts", flush_seconds=0)
    handle.remove()
    live = store.open_run(texts / "parts.live")
    assert live.table("sequence").height == 8
    tokens = live.table("sequence")["tokens"].sum()
    routed = live.table("expert_gradient").filter(kind="routed", layer=3)["tokens"].sum()
    assert routed == tokens * 2 == live.table("expert_load").filter(layer=3)["tokens"].sum()
    parts = store.open_run(_collect(model, texts, "parts", resume=True, flush_seconds=0))
    for table in TABLES:
        assert_frame_equal(parts.table(table), whole.table(table), rel_tol=1e-5, abs_tol=1e-5, check_row_order=False)


def test_models_without_gradients_are_refused(texts: Path) -> None:
    with pytest.raises(ModelError, match=r"DbrxExperts\) runs its experts outside the interface of transformers"):
        _collect(build("dbrx"), texts, "dbrx")
    model = build("olmoe")
    with pytest.raises(ModelError, match="has no language-model head"):
        _collect(model.model, texts, "headless")
    with pytest.raises(InputError, match="leave out one of the two"):
        _collect(model, texts, "both", generate=4)
    model.set_experts_implementation("eager")
    with pytest.raises(ModelError, match="level gradients needs model.set_experts_implementation"):
        _collect(model, texts, "eager")
