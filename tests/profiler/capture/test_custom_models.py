"""Custom architectures: each toy is recorded as it runs, and every count and norm equals a computation by hand."""

from __future__ import annotations

import runpy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor, nn

import profiler
import store
from compressor.families import ADAPTERS, Adapter, stacked_layout
from moescope.errors import InputError, ModelError
from tests.profiler.capture.by_hand import Expected, Key, check
from tests.profiler.capture.tiny import batch, build, output_of
from tests.profiler.capture.toys import EXAMPLES, HIDDEN, TOYS, example, run_plainly


@pytest.fixture(autouse=True)
def adapters() -> Iterator[dict[str, Adapter]]:
    before = dict(ADAPTERS)
    yield ADAPTERS
    ADAPTERS.clear()
    ADAPTERS.update(before)


def text(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids, and a mask that hides the end of each row but the first."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": torch.randint(32, (rows, length), generator=generator), "attention_mask": mask}


def calls_of(
    model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor, Tensor]]]]:
    """The model's output, and (hidden, ids, weights) of every call of each experts module, by plain hooks."""
    calls: dict[str, list[Any]] = defaultdict(list)
    handles = []
    for layer in profiler.find_moe_layers(model):

        def see(module: nn.Module, args: tuple[Tensor, ...], name: str = layer.name) -> None:
            calls[name].append(tuple(part.detach().clone() for part in args))

        handles.append(layer.experts.register_forward_pre_hook(see))
    with torch.no_grad():
        output = model(**inputs)
    for handle in handles:
        handle.remove()
    return output, calls


def record(model: nn.Module, inputs: dict[str, Tensor], folder: Path, *, again: int = 1) -> tuple[Tensor, store.Run]:
    with torch.no_grad(), profiler.watch(model, store=folder, name="toy", level="activations") as session:
        for _ in range(again):
            output = model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    return output, run


def of(frame: pl.DataFrame, key: Key) -> pl.DataFrame:
    return frame.filter((pl.col("layer") == key[0]) & (pl.col("step") == key[1])).sort("expert")


def check_call(run: store.Run, key: Key, ids: Tensor, weights: Tensor, outputs: Tensor, count: int) -> None:
    """One call of one experts module, with :func:`text`."""
    real = text()["attention_mask"].reshape(-1).bool()
    check(run, key, Expected(ids, weights, outputs), real=real, experts=count)


@dataclass
class Recorded:
    """A toy that ran once with plain hooks and once watched."""

    layers: list[profiler.MoELayer]
    calls: dict[str, list[Any]]
    bare: Tensor
    watched: Tensor
    run: store.Run


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Recorded]:
    @cache
    def toy(name: str) -> Recorded:
        ADAPTERS.update(TOYS[name].adapters)
        torch.manual_seed(0)
        model = TOYS[name].build()
        bare, calls = calls_of(model, text())
        watched, run = record(model, text(), tmp_path_factory.mktemp(name))
        return Recorded(profiler.find_moe_layers(model), calls, bare, watched, run)

    return toy


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_recorded_as_it_runs(name: str, toys: Callable[[str], Recorded]) -> None:
    toy = toys(name)
    assert torch.equal(toy.bare, toy.watched)
    places = Counter(layer.layer for layer in toy.layers)
    seen = set()
    for layer in toy.layers:
        for times, (hidden, ids, weights) in enumerate(toy.calls[layer.name]):
            key = (layer.layer, layer.step + times * places[layer.layer])
            seen.add(key)
            if name == "sequence":
                ids, weights = (part.reshape(-1, 2) for part in layer.experts.spread(hidden, ids, weights))
                hidden = hidden.reshape(-1, HIDDEN)
            check_call(toy.run, key, ids, weights, run_plainly(layer.experts, hidden, ids), layer.num_experts)
    assert set(toy.run.selections().layers) == seen
    assert set(toy.run.table("layer").select("layer", "step").iter_rows()) == seen


def test_kinds_of_experts_are_named(toys: Callable[[str], Recorded]) -> None:
    run = toys("null").run
    for layer in (0, 1):
        expert = of(run.table("expert"), (layer, 0))
        assert expert["kind"].to_list() == ["routed"] * 4 + ["zero", "copy", "constant"]
        assert expert["owner_layer"].to_list() == [layer] * 7
        assert expert["owner_expert"].to_list() == list(range(7))
        assert of(run.table("expert_weight"), (layer, 0))["expert"].to_list() == [0, 1, 2, 3]


def test_layers_may_differ_and_those_without_routing_have_no_place(toys: Callable[[str], Recorded]) -> None:
    run = toys("uneven").run
    layers = run.table("layer").sort("layer").select("layer", "num_experts", "top_k", "expert_width").rows()
    assert layers == [(1, 4, 1, 8), (3, 9, 3, 3)]
    assert run.info.num_layers == 4
    trace = run.selections()
    assert trace.ids.shape[3] == 3
    assert (trace.ids[0][..., 1:] == -1).all()


@torch.no_grad()
def test_layers_of_a_library_family_may_differ_too(tmp_path: Path) -> None:
    model = build("olmoe")
    small, single = model.model.layers[1].mlp, model.model.layers[2].mlp
    for module, names in ((small.experts, ("gate_up_proj", "down_proj")), (small.gate, ("weight",))):
        module.num_experts = 5
        for name in names:
            setattr(module, name, nn.Parameter(getattr(module, name)[:5].clone()))
    single.gate.top_k = 1
    bare = output_of(model(**batch()))
    with profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        assert torch.equal(output_of(model(**batch())), bare)
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    layers = run.table("layer").sort("layer").select("num_experts", "top_k").rows()
    assert layers == [(8, 2), (5, 2), (8, 1), (8, 2)]
    load = run.table("expert_load").group_by("layer").agg(pl.col("tokens").sum(), pl.col("expert").max()).sort("layer")
    assert load.select("tokens", "expert").rows() == [(54, 7), (54, 4), (27, 7), (54, 7)]


@torch.no_grad()
def test_layers_with_very_many_experts_have_no_pairs(tmp_path: Path) -> None:
    model = build("doge", num_experts=1156)
    with profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        model(**batch(1, 4, padding="none"))
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid", run.badge.reasons
    assert run.table("expert_pair").is_empty()
    assert run.table("expert_load")["tokens"].sum() == 4 * 4 * 4


def test_a_hash_router_has_no_scores(toys: Callable[[str], Recorded]) -> None:
    run = toys("hash").run
    assert run.table("router_load")["logit_tokens"].sum() == 0
    assert run.table("layer")["router_class"].to_list() == ["", ""]


def test_sequences_are_routed_as_a_whole(toys: Callable[[str], Recorded]) -> None:
    run = toys("sequence").run
    assert set(run.table("layer")["granularity"]) == {"sequence"}
    trace = run.selections()
    for row, length in enumerate(trace.lengths):
        assert (trace.ids[:, row, :length] == trace.ids[:, row, :1]).all()


def test_experts_of_other_layers_name_their_owners(toys: Callable[[str], Recorded]) -> None:
    run = toys("reusing").run
    expert = run.table("expert").sort("layer", "expert")
    assert run.table("layer").sort("layer")["num_experts"].to_list() == [8, 12, 8]
    for layer, owners in ((0, [0, 1]), (1, [0, 1, 2]), (2, [1, 2])):
        part = expert.filter(pl.col("layer") == layer)
        assert part["owner_layer"].to_list() == [owner for owner in owners for _ in range(4)]
        assert part["owner_expert"].to_list() == [0, 1, 2, 3] * len(owners)


def test_modules_that_share_a_layer_keep_their_steps(toys: Callable[[str], Recorded]) -> None:
    run = toys("twice").run
    layers = run.table("layer").sort("layer", "step").select("layer", "step", "module", "num_experts").rows()
    assert layers[:4] == [
        (0, 0, "layers.0.near.experts", 4),
        (0, 1, "layers.0.far.experts", 6),
        (0, 2, "layers.0.near.experts", 4),
        (0, 3, "layers.0.far.experts", 6),
    ]


def test_chained_experts_are_recorded_step_by_step(tmp_path: Path) -> None:
    chain = example("chain_of_experts")
    torch.manual_seed(0)
    model, inputs = chain.ChainModel(), text()
    bare, calls = calls_of(model, inputs)
    watched, run = record(model, inputs, tmp_path)
    assert torch.equal(bare, watched)
    assert run.selections().layers == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for layer in profiler.find_moe_layers(model):
        experts = layer.experts
        for step, (hidden, ids, weights) in enumerate(calls[layer.name]):
            gate, up = torch.einsum("tkih,th->tki", experts.up.double()[ids], hidden.double()).chunk(2, -1)
            outputs = torch.einsum("tkhi,tki->tkh", experts.down.double()[ids], nn.functional.silu(gate) * up).detach()
            check_call(run, (layer.layer, step), ids, weights, outputs, 8)
            # Each step has a router of its own.
            real = inputs["attention_mask"].reshape(-1).bool()
            logits = (hidden @ model.layers[layer.layer].routers[step].weight.T)[real].double().sum(0)
            load = of(run.table("expert_load"), (layer.layer, step))
            assert_allclose(load["logit_sum"].to_numpy(), logits.detach().numpy(), rtol=1e-4, atol=1e-5)
            rows = of(run.table("router_row"), (layer.layer, step))["weights"].to_list()
            assert_array_equal(np.array(rows), model.layers[layer.layer].routers[step].weight.detach().numpy())


def test_a_top_p_router_takes_as_many_experts_as_it_needs(tmp_path: Path) -> None:
    top_p = example("top_p_router")
    torch.manual_seed(0)
    model, inputs = top_p.TopPModel(), text()
    said: dict[int, list[Any]] = defaultdict(list)
    for index, layer in enumerate(model.layers):
        layer.mlp.router.register_forward_hook(lambda _, args, out, index=index: said[index].append((args[0], *out)))
    with torch.no_grad():
        bare = model(**inputs)
    watched, run = record(model, inputs, tmp_path)
    assert torch.equal(bare, watched)
    for index, layer in enumerate(model.layers):
        hidden, _, weights, ids = said[index][0]
        outputs = torch.zeros(*ids.shape, HIDDEN, dtype=torch.float64)
        for number, expert in enumerate(layer.mlp.experts):
            token, rank = torch.where(ids == number)
            inner = expert.act_fn(hidden[token].double() @ expert.gate_proj.weight.double().T)
            inner = inner * (hidden[token].double() @ expert.up_proj.weight.double().T)
            outputs[token, rank] = (inner @ expert.down_proj.weight.double().T).detach()
        check_call(run, (index, 0), ids, weights, outputs, 8)
    taken = (run.selections().ids >= 0).sum(-1)
    counts = [set(np.unique(part[part > 0]).tolist()) for part in taken]
    assert all(len(part) > 1 for part in counts)
    assert run.table("layer").sort("layer")["top_k"].to_list() == [max(part) for part in counts]


@pytest.mark.parametrize("name", ["chain_of_experts", "top_p_router"])
def test_the_examples_run_by_themselves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "valid" in capsys.readouterr().out


def test_k_may_change_from_call_to_call(tmp_path: Path, adapters: dict[str, Adapter]) -> None:
    torch.manual_seed(0)
    model, inputs = TOYS["uneven"].build(), text()
    adapters.update(TOYS["uneven"].adapters)
    router = model.layers[3].router
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="toy", level="activations") as session:
        for router.top_k in (3, 1, 4):
            model(**inputs)
            if router.top_k == 1:
                session.flush()
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.table("layer").filter(pl.col("layer") == 3)["top_k"].to_list() == [4]
    tokens = int(inputs["attention_mask"].sum())
    assert run.table("expert_load").filter(pl.col("layer") == 3)["tokens"].sum() == tokens * (3 + 1 + 4)
    trace = run.selections()
    taken = (trace.ids[1] >= 0).sum(-1)
    there = np.arange(taken.shape[1])[None] < trace.lengths[:, None]
    for place, k in enumerate((3, 1, 4)):
        rows = slice(3 * place, 3 * place + 3)
        assert (taken[rows][there[rows]] == k).all()


def test_a_step_that_is_sometimes_left_out(tmp_path: Path) -> None:
    chain = example("chain_of_experts")
    torch.manual_seed(0)
    model, inputs = chain.ChainModel(), text()
    tokens = int(inputs["attention_mask"].sum())
    routers = model.layers[1].routers
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="toy") as session:
        model(**inputs)
        model.layers[1].routers = routers[:1]
        model(**inputs)
    assert session.path is not None
    run = store.open_run(session.path)
    load = run.table("expert_load").group_by("layer", "step").agg(pl.col("tokens").sum())
    assert {row[:2]: row[2] for row in load.rows()} == {
        (0, 0): 4 * tokens, (0, 1): 4 * tokens, (1, 0): 4 * tokens, (1, 1): 2 * tokens,
    }  # fmt: skip


def test_ids_of_none_are_an_error_where_nobody_announced_them(tmp_path: Path, adapters: dict[str, Adapter]) -> None:
    torch.manual_seed(0)
    model = TOYS["uneven"].build()
    adapters.update(TOYS["uneven"].adapters)
    router = model.layers[3].router
    plain = type(router).forward

    def dropping(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = plain(router, hidden)
        ids[:, 2], weights[:, 2] = -1, 0
        return logits, weights, ids

    router.forward = dropping
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="toy", level="activations") as session:
        model(**text())
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "invalid"
    assert "selections add up" in run.badge.reason


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = TOYS["uneven"].build(), TOYS["uneven"].build()

    def forward(self, input_ids: Tensor) -> Tensor:
        output: Tensor = self.left(input_ids) + self.right(input_ids)
        return output


def test_stacks_that_nobody_can_tell_apart_are_listed(tmp_path: Path, adapters: dict[str, Adapter]) -> None:
    adapters["ToyExperts"] = Adapter(stacked_layout("up", "down"))
    model = TwoStacks()
    with pytest.raises(ModelError, match=r"several stacks .* by stack=: left\.layers, right\.layers"):
        profiler.watch(model, store=tmp_path, name="toy")
    with pytest.raises(InputError, match=r"stack 'middle' is none .*: left\.layers, right\.layers"):
        profiler.watch(model, store=tmp_path, name="toy", stack="middle")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="toy", stack="right.layers") as session:
        model(text()["input_ids"])
    assert session.path is not None
    run = store.open_run(session.path)
    assert set(run.table("layer")["stack"]) == {"right.layers"}
    assert run.info.tokens == text()["input_ids"].numel()
    (other,) = run.table("check").filter(pl.col("name") == "other experts")["detail"].to_list()
    assert other == "stack left.layers (left.layers) has experts in 2 modules: not recorded in this run"
