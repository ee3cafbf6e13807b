"""Traps that have produced wrong traces elsewhere, each set once, to see that the badge turns or the figure holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_array_equal
from torch import Tensor

import profiler
import store
from app.frames.alerts import alerts
from moescope.errors import ModelError
from tests.profiler.capture.tiny import batch, build, recorded_calls

Forward = Callable[[Tensor], Tensor]


def watched(model: Any, folder: Path, *batches: dict[str, Tensor], name: str = "trap", **options: Any) -> store.Run:
    with torch.no_grad(), profiler.watch(model, store=folder, name=name, **options) as session:
        for inputs in batches or (batch(),):
            model(**inputs)
    assert session.path is not None
    return store.open_run(session.path)


def turned(run: store.Run) -> dict[str, list[Any]]:
    """The checks that failed or warn, each with its layers; the badge must name them all."""
    table = run.table("check").filter(pl.col("status").is_in(["fail", "warning"]))
    found = {name: table.filter(name=name)["layer"].to_list() for name in table["name"].unique()}
    for name in found:
        assert any(reason.startswith(f"{name}: ") for reason in run.badge.reasons)
    return found


def kernel(block: Any, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Forward:
    """The forward of a block whose ids and weights are changed before its experts see them."""

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(flat)
        ids, weights = change(ids, weights)
        result: Tensor = block.experts(flat, ids, weights)
        return result.reshape(hidden.shape)

    return forward


def beside(block: Any) -> Forward:
    """A kernel of its own: the same arithmetic on the same weights, but the experts module is never called."""
    experts = block.experts

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(flat)
        first = torch.einsum("th,tkoh->tko", flat, experts.gate_up_proj[ids])
        gate, up = first.chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        rows = torch.einsum("tki,tkhi->tkh", inner, experts.down_proj[ids])
        return torch.einsum("tk,tkh->th", weights.to(rows.dtype), rows).reshape(hidden.shape)

    return forward


def test_fused_experts_that_hooks_on_single_experts_would_miss(tmp_path: Path) -> None:
    model = build("olmoe")
    assert not [name for name, _ in model.named_modules() if ".experts.0" in name]  # nothing there to hook
    run = watched(model, tmp_path)
    assert run.badge.status == "valid", run.badge.reasons
    assert run.table("expert_load")["tokens"].sum() == 27 * 2 * 4
    for layer in model.model.layers:
        layer.mlp.forward = beside(layer.mlp)
    run = watched(model, tmp_path, name="missed")
    assert run.badge.status == "invalid"
    assert turned(run) == {"layer seen": [0, 1, 2, 3]}


def test_replay_of_a_cuda_graph_runs_no_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("olmoe")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="trap") as session:
        model(**batch())
        with monkeypatch.context() as graph:
            graph.setattr(torch.cuda, "is_initialized", lambda: True)
            graph.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            model(**batch())
    run = store.open_run(session.path)
    assert run.info.tokens == 27  # the captured forward is no text: what it computed is thrown away
    assert run.badge.status == "invalid"
    assert "captured into a CUDA graph" in run.badge.reason
    assert turned(run) == {"forwards run by Python": [None]}


@pytest.mark.parametrize("returned", ["probabilities", "the largest probability", "another layer's"])
def test_a_router_output_that_is_not_what_its_name_says(returned: str, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    router = model.model.layers[2].mlp.gate
    whole = router.forward

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = whole(hidden)
        probabilities = logits.float().softmax(-1)
        said = {
            "probabilities": probabilities,
            "the largest probability": probabilities.amax(-1, keepdim=True),
            "another layer's": hidden.float() @ model.model.layers[1].mlp.gate.weight.T,
        }
        return said[returned], weights, ids

    router.forward = forward
    run = watched(model, tmp_path, level="activations")
    assert run.badge.status == "warning"
    expected = {
        "probabilities": {"scores are logits": [2]},
        "the largest probability": {"scores shown": [2]},
        "another layer's": {"weights follow scores": [2], "selection follows scores": [2]},
    }
    assert turned(run) == expected[returned]


def test_top_k_of_logits_that_ignores_bias_and_groups(tmp_path: Path) -> None:
    model, inputs = build("deepseek_v3"), batch(padding="none")
    with torch.no_grad(), recorded_calls(model) as calls:
        model(**inputs)
    run = watched(model, tmp_path, inputs)
    assert run.badge.status == "valid", run.badge.reasons
    trace, otherwise = run.selections(), 0
    for axis, entry in enumerate(calls):
        ids = np.sort(trace.ids[axis].reshape(-1, entry.layer.top_k))
        assert_array_equal(ids, entry.ids[0].sort().values.numpy())
        otherwise += (ids != entry.logits[0].topk(entry.layer.top_k).indices.sort().values.numpy()).any(1).sum()
    assert otherwise > 20  # of 3 x 36: taking the top-k of the logits again would have been wrong there
    explained = run.table("check").filter(name="selection follows scores")
    assert explained["value"].sum() == pytest.approx(otherwise, abs=3)  # the check forgives what rounding may do
    assert explained["detail"].str.contains("groups of experts").all()


def test_a_kernel_that_routes_inside_and_leaves_its_buffer_empty(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[1].mlp
    block.forward = kernel(block, lambda ids, weights: (torch.zeros_like(ids), torch.zeros_like(weights)))
    run = watched(model, tmp_path, batch(padding="none"))
    assert run.badge.status == "invalid"
    assert {"experts distinct", "tokens reach experts", "router's choice ran", "expert ids vary"} <= set(turned(run))
    assert set(sum(turned(run).values(), [])) == {1}


def test_dense_layers_that_would_look_like_expert_0(tmp_path: Path) -> None:
    model = build("deepseek_v3")  # its first layer is dense
    run = watched(model, tmp_path)
    assert run.info.num_layers == 4
    assert [key for key, _ in run.selections().layers] == [1, 2, 3]
    for table in ("expert_load", "router_load", "route_chunk", "check"):
        assert 0 not in run.table(table)["layer"].drop_nulls().to_list()
    assert run.badge.status == "valid", run.badge.reasons


def test_a_prefix_cache_that_skips_tokens(tmp_path: Path) -> None:
    model, ids = build("olmoe"), batch(2, 8, padding="none")["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        with profiler.watch(model, store=tmp_path, name="trap") as session:
            model(input_ids=ids[:, 5:], past_key_values=cache)
    run = store.open_run(session.path)
    assert run.badge.status == "warning"
    assert turned(run) == {"whole sequences": [None]}
    assert run.table("check").filter(name="whole sequences")["value"].to_list() == [2.0]
    assert run.table("router_load")["tokens"].to_list() == [6] * 4
    assert run.table("expert_load")["first_positions"].sum() == 0  # position 0 was in the cache, and is not made up


def test_rejected_drafts_and_counters_that_go_on_across_runs(tmp_path: Path) -> None:
    model, assistant = build("olmoe"), build("olmoe", num_hidden_layers=1)
    for part in (model, assistant):
        part.generation_config.eos_token_id, part.generation_config.pad_token_id = None, 0
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="trap") as session:
        model.generate(**batch(1, padding="none"), max_new_tokens=6, do_sample=False, assistant_model=assistant)
    run = store.open_run(session.path)
    assert run.badge.status == "warning"
    assert turned(run) == {"tokens kept": [None]}
    assert run.table("check").filter(name="tokens kept")["value"].item() > 0
    counts = [watched(model, tmp_path, name=name).table("expert_load")["tokens"].sum() for name in ("one", "two")]
    assert counts == [27 * 2 * 4] * 2


def test_padding_counted_as_tokens(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch(padding="left")
    run = watched(model, tmp_path, inputs)
    assert run.badge.status == "valid", run.badge.reasons
    assert run.table("router_load")["tokens"].to_list() == [27] * 4
    assert run.table("check").filter(name="padding left out")["value"].to_list() == [9.0]
    blind = torch.zeros(3, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), torch.finfo(torch.float32).min)
    run = watched(model, tmp_path, {"input_ids": inputs["input_ids"], "attention_mask": blind}, name="blind")
    assert run.badge.status == "warning"
    assert turned(run) == {"mask known": [None]}


def test_only_the_experts_of_one_rank(tmp_path: Path) -> None:
    model = build("olmoe")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts .* runs expert-parallel"):
        watched(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_kernel_on_repacked_weights_that_bypasses_half_of_the_layers(tmp_path: Path) -> None:
    model, inputs = build("olmoe"), batch()
    with torch.no_grad():
        before = model(**inputs).logits
        for index in (1, 3):
            model.model.layers[index].mlp.forward = beside(model.model.layers[index].mlp)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-3, atol=1e-4)  # nothing to see from outside
    run = watched(model, tmp_path, inputs, inputs)
    assert run.badge.status == "invalid"
    assert turned(run) == {"layer seen": [1, 3]}
    assert run.badge.reason == "layer seen: layer 1: missing in 2 of 2 forwards (and 1 more)"


def test_ids_that_a_fused_shared_expert_makes_one_too_large(tmp_path: Path) -> None:
    model = build("olmoe", num_experts_per_tok=3)  # nor is k always 8
    block = model.model.layers[1].mlp
    model.set_experts_implementation("eager")

    def with_shared(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        shared = torch.full_like(ids[:, :1], 8)  # numbered after the 8 routed ones
        return torch.cat([ids, shared], 1), torch.cat([weights, torch.ones_like(weights[:, :1])], 1)

    block.forward = kernel(block, with_shared)
    run = watched(model, tmp_path)
    assert run.badge.status == "invalid"
    assert turned(run)["expert ids in range"] == [1]
    assert run.table("check").filter(name="expert ids in range", layer=1)["value"].to_list() == [27.0]
    assert run.table("expert_load")["expert"].max() == 7
    assert run.table("expert_load").filter(layer=1)["tokens"].sum() == 27 * 3


def test_an_average_over_layers_that_hides_a_collapsed_layer(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad():
        for layer in model.model.layers:  # even everywhere ...
            layer.mlp.gate.weight.normal_(std=0.5)
    block = model.model.layers[2].mlp
    block.forward = kernel(block, lambda ids, weights: (torch.tensor([[0, 1]]).expand_as(ids), weights))  # ... but here
    run = watched(model, tmp_path, *(batch(3, 40, padding="none", seed=seed) for seed in range(3)))
    load = run.table("expert_load")
    mean = load.group_by("expert").agg(pl.col("tokens").sum())["tokens"]
    assert mean.max() / mean.mean() < 4 / 2  # over all layers the busiest expert has less than twice the mean
    found = alerts(run).filter(pl.col("alert") == "routing collapse")
    assert found.select("severity", "layers").rows() == [("problem", "2")]
    assert turned(run)["expert ids vary"] == [2]


def test_counters_that_saturate_and_make_a_busy_layer_look_even(tmp_path: Path) -> None:
    """Counts of a window of a fixed length per expert would approach a ratio of 1; here 200,000 selections keep 7."""
    model = build("olmoe", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=8)
    block = model.model.layers[0].mlp
    block.forward = _uneven(block)
    ids = torch.full((8, 500), 5)
    with torch.no_grad(), profiler.watch(model.model, store=tmp_path, name="trap") as session:
        for _ in range(50):
            model.model(input_ids=ids)
    load = store.open_run(session.path).table("expert_load").sort("expert")["tokens"]
    assert load.sum() == 50 * 8 * 500
    assert load.max() / load.mean() == 7.0


def _uneven(block: Any) -> Forward:
    """Seven of eight tokens go to expert 0, so that its load is 7 times the mean of 8 experts."""

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        place = torch.arange(len(flat))
        ids = torch.where(place % 8 < 7, 0, 1 + place // 8 % 7)[:, None]
        result: Tensor = block.experts(flat, ids, torch.ones(len(flat), 1))
        return result.reshape(hidden.shape)

    return forward


def test_a_later_domain_that_overwrites_an_earlier_one(tmp_path: Path) -> None:
    model, domains = build("olmoe"), ("code", "german", "code")
    texts = [batch(seed=seed) for seed in range(3)]
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="trap", level="activations") as session:
        for domain, inputs in zip(domains, texts, strict=True):
            session.label(domains=domain)
            model(**inputs)
            session.flush()
    run = store.open_run(session.path)
    for domain, expected in (("code", [texts[0], texts[2]]), ("german", [texts[1]])):
        alone = watched(model, tmp_path, *expected, name=domain, level="activations", domain=domain)
        for table, columns in (("expert_load", ["tokens"]), ("expert_output", ["tokens", "output_max"])):
            keys = ["layer", "expert"]
            found = run.table(table).filter(domain=domain).sort(keys).select(*keys, *columns)
            assert found.equals(alone.table(table).sort(keys).select(*keys, *columns))


def test_ties_of_bfloat16_that_float32_does_not_have(tmp_path: Path) -> None:
    """A large score that all experts share leaves bfloat16 no room for their differences."""
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("olmoe", dtype=dtype)
        _share_a_score(model)
        runs[dtype] = watched(model, tmp_path, batch(4, 60, padding="none"), name=str(dtype))
    exact, rounded = runs[torch.float32], runs[torch.bfloat16]
    assert exact.badge.status == "valid", exact.badge.reasons
    assert exact.table("router_load")["boundary_ties"].sum() == 0
    assert rounded.badge.status == "warning"
    assert set(turned(rounded)) == {"ties at the boundary"}
    assert (exact.selections().ids[0] != rounded.selections().ids[0]).any()


def _share_a_score(model: Any) -> None:
    """Every router adds 50 to all of its scores, in the type that it computes in, before it chooses."""
    for layer in model.model.layers:
        router = layer.mlp.gate

        def forward(hidden: Tensor, router: Any = router) -> tuple[Tensor, Tensor, Tensor]:
            logits = torch.nn.functional.linear(hidden, router.weight) + 50
            weights, ids = logits.float().softmax(-1).topk(router.top_k, dim=-1)
            return logits, weights.to(logits.dtype), ids

        router.forward = forward
