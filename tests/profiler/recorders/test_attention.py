"""Attention of position 0 against the weights that eager attention returns, with padding, windows, caches and sinks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

import profiler
import store
from profiler.capture import attention
from profiler.capture.discovery import inspect_model
from tests.profiler.capture.tiny import batch, build, output_of

FAMILIES = ("olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral", "gemma4_text", "deepseek_v32", "qwen3_next")


@contextmanager
def eager_weights(model: Any) -> Iterator[dict[int, Tensor]]:
    """While entered, (batch, heads, queries, keys) attention weights of the last forward, by decoder layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    weights: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and getattr(output[1], "ndim", 0) == 4:
                weights[layer] = output[1].double()

        return see

    handles = [
        module.register_forward_hook(hook(index))
        for index, layer in enumerate(inspect_model(model).stack)
        for module in layer.modules()
        if "Attention" in type(module).__name__
    ]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def expected(weights: Tensor, mask: Tensor, *, first: int = 0, last: int | None = None) -> tuple[int, np.ndarray]:
    """Queries, and the sum per head of what they give the first real token, among positions from first to last."""
    queries, total = 0, np.zeros(weights.shape[1])
    for row in range(len(mask)):
        real = mask[row].nonzero()[:, 0].tolist()
        for column in real[max(first, 1) : last]:
            queries += 1
            total += weights[row, :, column, real[0]].numpy()
    return queries, total


def watch(model: Any, run: Any, path: Path, mask: Tensor | None = None) -> tuple[Any, pl.DataFrame]:
    """What ``run()`` returns under a watch, and table attention."""
    with profiler.watch(model, store=path, name="run", level="attention", domain="x") as session, torch.no_grad():
        session.label(mask=mask)
        result = run()
    assert session.path is not None
    with store.open_run(session.path) as opened:
        return result, opened.table("attention")


def compare(table: pl.DataFrame, layer: int, phase: str, queries: int, total: np.ndarray, tolerance: float) -> None:
    row = table.filter((pl.col("layer") == layer) & (pl.col("phase") == phase)).row(0, named=True)
    assert row["queries"] == queries
    assert row["domain"] == "x"
    np.testing.assert_allclose(np.array(row["sink_sum"]) / queries, total / queries, atol=tolerance, rtol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt(tmp_path: Path, family: str, padding: str) -> None:
    model, inputs = build(family), batch(padding=padding)
    with torch.no_grad():
        plain = output_of(model(**inputs))
    seen, table = watch(model, lambda: output_of(model(**inputs)), tmp_path)
    assert torch.equal(plain, seen)
    with eager_weights(model) as weights, torch.no_grad():
        model(**inputs)
    assert weights
    assert table["layer"].to_list() == sorted(weights)  # linear attention has no weights, and no rows
    for layer, values in weights.items():
        compare(table, layer, "prompt", *expected(values, inputs["attention_mask"]), 1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_decode_with_a_cache_that_slides(tmp_path: Path, family: str, cache: str) -> None:
    window = {"sliding_window": 9} if family in ("mixtral", "gpt_oss") else {}
    model, inputs = build(family, **window), batch(padding="left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options |= {"disable_compile": True, "pad_token_id": 0}
    # With a static cache, generate hides its 2-D mask in a 4-D one: the caller has to say it.
    mask = inputs["attention_mask"] if cache == "static" else None
    text, table = watch(model, lambda: model.generate(**inputs, **options), tmp_path, mask)
    # The whole text in one forward without a cache says what every single step must have seen.
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], 1)
    with eager_weights(model) as weights, torch.no_grad():
        model(input_ids=text[:, :17], attention_mask=mask)
    for layer, values in weights.items():
        prompts = [int(inputs["attention_mask"][row].sum()) for row in range(3)]
        parts = [expected(values[[r]], mask[[r]], first=prompts[r]) for r in range(3)]
        decode = sum(part[0] for part in parts), np.sum([part[1] for part in parts], axis=0)
        assert decode[0] == 15
        compare(table, layer, "decode", *decode, 1e-5)
        parts = [expected(values[[r]], mask[[r]], last=prompts[r]) for r in range(3)]
        compare(table, layer, "prompt", sum(part[0] for part in parts), np.sum([p[1] for p in parts], axis=0), 1e-5)


def test_a_window_leaves_the_first_position_behind(tmp_path: Path) -> None:
    model, inputs = build("mixtral", sliding_window=4), batch(rows=1)
    _, table = watch(model, lambda: model(**inputs), tmp_path)
    with eager_weights(model) as weights, torch.no_grad():
        model(**inputs)
    assert float(weights[0][0, :, 4:, 0].abs().max()) == 0.0  # out of the window: counted, with probability 0
    compare(table, 0, "prompt", *expected(weights[0], inputs["attention_mask"]), 1e-6)
    assert table["queries"].to_list() == [11] * 4


def test_a_learnt_sink_takes_its_share_whatever_the_weights_say(tmp_path: Path) -> None:
    # GraniteMoE SWA returns weights without its sink and scales the output instead; GPT-OSS puts it into the softmax.
    model, inputs = build("granitemoe_swa"), batch()
    _, table = watch(model, lambda: model(**inputs), tmp_path)
    with eager_weights(model) as weights, torch.no_grad():
        model(**inputs)
    queries, without = expected(weights[0], inputs["attention_mask"])
    assert (np.array(table["sink_sum"][0]) < without).all()
    assert table["queries"][0] == queries


def test_half_precision_is_summed_in_full(tmp_path: Path) -> None:
    model, inputs = build("olmoe", dtype=torch.bfloat16), batch()
    with torch.no_grad():
        plain = output_of(model(**inputs))
    seen, table = watch(model, lambda: output_of(model(**inputs)), tmp_path)
    assert torch.equal(plain, seen)
    with eager_weights(model) as weights, torch.no_grad():
        model(**inputs)
    # Eager attention rounds its scores and weights to 8 bits; the first layer's inputs are the same all the same.
    compare(table, 0, "prompt", *expected(weights[0], inputs["attention_mask"]), 5e-3)


def test_attention_to_an_encoder_is_left_out(tmp_path: Path) -> None:
    # Switch Transformers: scores carry a learnt bias by position, and each decoder layer looks at the encoder too.
    model, inputs = build("switch_transformers"), batch()
    inputs["decoder_input_ids"] = inputs["input_ids"][:, :9]
    _, table = watch(model, lambda: model(**inputs), tmp_path)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).decoder_attentions
    for layer, values in enumerate(weights):
        compare(table, layer, "prompt", *expected(values.double(), torch.ones(3, 9)), 1e-6)


def test_compressed_keys_give_no_rows(tmp_path: Path) -> None:
    model, inputs = build("deepseek_v4"), batch()
    _, table = watch(model, lambda: model(**inputs), tmp_path)
    assert table.is_empty()


def test_a_failed_forward_leaves_nothing(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()

    def fail_then_run() -> None:
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        model(**inputs)

    _, table = watch(model, fail_then_run, tmp_path)
    assert table["queries"].to_list() == [int(inputs["attention_mask"].sum()) - 3] * 4


def test_queries_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("gpt_oss"), batch(length=24)
    calls: list[attention.AttentionCall] = []
    with attention.watched_attention(calls.append), torch.no_grad():
        model(**inputs)
    column = torch.tensor([0, 0, -1])
    whole = attention.sink_probability(calls[0], column)
    monkeypatch.setattr(attention, "ENTRIES", 3 * 4 * 24 * 5)
    assert len(attention._chunks(calls[0])) == 5
    torch.testing.assert_close(attention.sink_probability(calls[0], column), whole, atol=1e-7, rtol=0)
    assert (whole[2] == 0).all()
    assert (whole[:2, 1:].amax((1, 2)) > 0.01).all()


def test_the_interface_is_put_back() -> None:
    before = AttentionInterface.get_interface
    with attention.watched_attention(lambda _: None):
        with pytest.raises(RuntimeError), attention.watched_attention(lambda _: None):
            assert AttentionInterface.get_interface is not before
            raise RuntimeError
        assert AttentionInterface.get_interface is not before
    assert AttentionInterface.get_interface is before
