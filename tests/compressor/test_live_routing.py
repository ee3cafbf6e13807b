"""Rules before the experts of running models, against the same forwards with ids and weights made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import profiler
import store
from compressor.routing import (
    Bias,
    MaskTop,
    NullExperts,
    Odp,
    Rank,
    Ratio,
    Rule,
    Threshold,
    TopK,
    TopP,
    rerouted,
)
from moescope.errors import ModelError
from profiler.capture.discovery import find_moe_layers
from tests.compressor.edited_models import near, run
from tests.profiler.capture.tiny import batch, build, recorded_calls

ByHand = Callable[[Tensor, Tensor, Tensor], tuple[list[list[int]], list[list[float]]]]
"""(ids, weights, logits) of the router -> experts and weights of every token, of any number."""

KINDS = {
    "olmoe": ("softmax", False, 1.0),
    "mixtral": ("softmax", True, 1.0),
    "qwen2_moe": ("softmax", False, 1.0),
    "gpt_oss": ("softmax", True, 1.0),
    "deepseek_v3": ("sigmoid", True, 2.5),
    "lfm2_moe": ("sigmoid", True, 1.0),
    "longcat_flash": ("softmax", False, 6.0),
}
"""Score, whether the chosen are divided by their sum, factor: as their routers are written in the library."""

REFUSED = {
    "doge": "not called with", "jetmoe": "not called with", "llama4_text": "not called with",
    "switch_transformers": "not called with", "nllb-moe": "cannot be rerouted",
}  # fmt: skip
DROPS_ONLY = {"phimoe": "gate weights", "inkling_text": "gate weights", "deepseek_v4": "table of token ids"}


@contextmanager
def by_hand(model: nn.Module, change: ByHand) -> Iterator[None]:
    """While entered, experts run what ``change`` says, padded with weight 0; plain hooks, nothing else."""
    handles = []
    for layer in find_moe_layers(model):
        shown: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any, shown: list[Tensor] = shown, index: int = 0) -> None:
            shown[:] = [output[index]]

        def put(module: Any, args: Any, kwargs: Any, shown: list[Tensor] = shown) -> Any:
            values: list[Tensor] = [*args, *kwargs.values()]
            hidden, ids, weights = values
            experts, gates = change(ids, weights, shown[0].reshape(len(ids), -1))
            slots = max(2, *map(len, experts))
            new_ids = torch.tensor([one + [0] * (slots - len(one)) for one in experts])
            new_weights = torch.tensor([one + [0.0] * (slots - len(one)) for one in gates]).to(weights.dtype)
            return (hidden, new_ids, new_weights), {}

        assert layer.router is not None
        handles += [
            layer.router.register_forward_hook(keep),
            layer.experts.register_forward_pre_hook(put, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scores(family: str, logits: Tensor) -> Tensor:
    return logits.float().softmax(-1) if KINDS[family][0] == "softmax" else logits.float().sigmoid()


def _gate(family: str, scores: Tensor, chosen: list[int]) -> list[float]:
    _, renormalized, factor = KINDS[family]
    own = [float(scores[expert]) for expert in chosen]
    return [value * factor / (sum(own) if renormalized else 1.0) for value in own]


def _ratio(ids: Tensor, weights: Tensor, logits: Tensor, *, beta: float = 0.6) -> Any:
    """Token by token: those with so large a part of the largest, scaled to the old sum."""
    experts, gates = [], []
    for row, own in zip(ids.tolist(), weights.tolist(), strict=True):
        stays = [place for place, weight in enumerate(own) if weight >= beta * max(own)]
        experts.append([row[place] for place in stays])
        gates.append([own[place] * sum(own) / sum(own[one] for one in stays) for place in stays])
    return experts, gates


@pytest.mark.parametrize("family", KINDS)
def test_ratio_skipping_is_the_plain_loop(family: str) -> None:
    model = build(family)
    with by_hand(model, _ratio):
        wanted = run(model)
    for rule in (Ratio(0.6), Odp(0.6)):
        with rerouted(model, rule) as routing:
            near(run(model), wanted, 1e-5)
        taken = routing.take()
        assert any(bool((one.active == 1).any()) for one in taken.values()) and routing.take() == {}
        for one in taken.values():
            assert torch.equal(one.changed, one.active < 2) and bool((one.kept[~one.changed] == 1).all())


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_backends_run_what_rules_say(family: str, backend: str) -> None:
    model = build(family)
    model.set_experts_implementation(backend)
    plain = run(model)
    with rerouted(model, Ratio(0.0)) as routing:
        assert torch.equal(run(model), plain)
    assert all(not one.changed.any() and bool((one.kept == 1).all()) for one in routing.take().values())
    with by_hand(model, _ratio):
        wanted = run(model)
    with rerouted(model, Ratio(0.6)):
        near(run(model), wanted, 5e-6)
    assert torch.equal(run(model), plain), "hooks stayed behind"


def _more(family: str, model: nn.Module, k: int) -> ByHand:
    """The first k of the order in which the family's router is written to choose, with its own weights."""
    biases = _biases(model)
    calls = iter(range(10**6))

    def change(ids: Tensor, weights: Tensor, logits: Tensor) -> Any:
        scores = _scores(family, logits)
        order = scores + biases[next(calls) % len(biases)] if biases else scores
        if family == "deepseek_v3":
            blocks = order.view(len(order), 2, 4)
            best = blocks.topk(2, -1).values.sum(-1).argmax(-1)
            order = torch.where(torch.arange(2)[None, :, None] == best[:, None, None], blocks, -torch.inf).flatten(1)
        experts = [row.topk(k).indices.tolist() for row in order]
        return experts, [_gate(family, scores[token], chosen) for token, chosen in enumerate(experts)]

    return change


def _biases(model: nn.Module) -> list[Tensor]:
    found = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return [value for name, value in found.items() if name.endswith(("e_score_correction_bias", "expert_bias"))]


@pytest.mark.parametrize("family", KINDS)
def test_more_experts_are_the_gates_own(family: str) -> None:
    model = build(family)
    with by_hand(model, _more(family, model, 3)):
        wanted = run(model)
    weights: Any = "renormalized" if KINDS[family][1] else "kept"
    with rerouted(model, TopK(3, weights)) as routing:
        near(run(model), wanted, 2e-5)
    assert all(bool((one.active == 3).all()) for one in routing.take().values())
    assert {(gate.score, gate.renormalized, gate.scale) for gate in routing.gates.values()} == {KINDS[family]}


@pytest.mark.parametrize("weights", ["kept", "renormalized"])
def test_top_p_takes_prefixes_beyond_k(weights: Any) -> None:
    model = build("mixtral")

    def change(ids: Tensor, own: Tensor, logits: Tensor) -> Any:
        experts, gates = [], []
        for token, row in enumerate(logits.softmax(-1)):
            order, count, mass = row.argsort(descending=True).tolist(), 0, 0.0
            while count < len(order) and (count == 0 or mass <= 0.7):
                mass += float(row[order[count]])
                count += 1
            experts.append(order[:count])
            before = sum(float(row[expert]) for expert in ids[token].tolist())  # what the two were divided by
            gates.append([float(row[one]) / (mass if weights == "renormalized" else before) for one in order[:count]])
        return experts, gates

    with by_hand(model, change):
        wanted = run(model)
    with rerouted(model, TopP(0.7, weights)) as routing:
        near(run(model), wanted, 1e-5)
    active = torch.cat([one.active for one in routing.take().values()])
    assert active.min() == 1 and active.max() > 2


def test_each_rule_on_one_token_by_hand() -> None:
    """Four experts, k = 2, probabilities 0.4, 0.3, 0.2, 0.1; the router does not divide by the sum."""
    model = build("olmoe", num_experts=4, num_experts_per_tok=2)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    cases: list[tuple[Rule, dict[int, float]]] = [
        (Ratio(0.8, "kept"), {0: 0.4}),
        (Ratio(0.8), {0: 0.7}),
        (Ratio(0.7), {0: 0.4, 1: 0.3}),
        (Odp(0.8), {0: 0.7}),
        (Threshold(0.35, "kept"), {0: 0.4}),
        (Threshold(0.5), {}),
        (NullExperts(float(torch.tensor(0.35).log())), {0: 0.7}),
        (TopK(1, "kept"), {0: 0.4}),
        (TopK(3, "kept"), {0: 0.4, 1: 0.3, 2: 0.2}),
        (TopK(3), {0: 0.4 * 7 / 9, 1: 0.3 * 7 / 9, 2: 0.2 * 7 / 9}),
        (TopP(0.39, "kept"), {0: 0.4}),
        (TopP(0.75, "kept"), {0: 0.4, 1: 0.3, 2: 0.2}),
        (TopP(1.0), {0: 0.28, 1: 0.21, 2: 0.14, 3: 0.07}),
        (Rank(2, "kept"), {1: 0.3}),
        (Rank(3), {2: 0.7}),
        (MaskTop(0.25), {1: 0.3, 2: 0.2}),
        (Bias(torch.tensor([0.0, 0.0, 0.0, 8.0])), {3: _softmaxed(8.0)[3], 0: _softmaxed(8.0)[0]}),
    ]
    layer = find_moe_layers(model)[0]
    router: Any = layer.router
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = logits
    seen: list[dict[int, float]] = []

    def look(module: Any, args: Any) -> None:
        found = zip(args[1][0].tolist(), args[2][0].tolist(), strict=True)
        seen.append({expert: weight for expert, weight in found if weight})

    # The layer sees one channel of 1, so that its logits are the row above.
    one = torch.zeros(1, router.weight.shape[1])
    one[0, 0] = 1.0
    fixed = router.register_forward_pre_hook(lambda module, args: (one.expand(args[0].shape[0], -1),))
    for rule, wanted in cases:
        with rerouted(model, {(0, 0): rule}):
            handle = layer.experts.register_forward_pre_hook(look)
            run(model)
            handle.remove()
        assert seen[-1] == pytest.approx(wanted, abs=1e-6), rule
    fixed.remove()


def _softmaxed(last: float) -> list[float]:
    values = torch.tensor([0.4, 0.3, 0.2, 0.1]).log() + torch.tensor([0.0, 0.0, 0.0, last])
    return values.softmax(0).tolist()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "afmoe", "gemma4_text", "zaya", "kolibri1"])
def test_a_bias_of_zeros_changes_no_bit_and_shows_its_gradient(family: str) -> None:
    model = build(family).requires_grad_(False)
    plain = run(model)
    layers = find_moe_layers(model)
    delta = torch.zeros(layers[0].num_experts, requires_grad=True)
    with rerouted(model, Bias(delta)) as routing:
        assert torch.equal(run(model), plain)
        assert not any(bool(one.changed.any()) for one in routing.take().values())
    last = layers[-1].key  # what a shift there does meets no further choice
    with rerouted(model, {last: Bias(delta)}):
        model(**batch(1, 6)).logits.float().pow(2).mean().backward()
    assert delta.grad is not None and bool(torch.isfinite(delta.grad).all())
    expert = int(delta.grad.abs().argmax())
    sides = []
    for step in (3e-3, -3e-3):
        shifted = torch.zeros(len(delta))
        shifted[expert] = step
        with torch.no_grad(), rerouted(model, {last: Bias(shifted)}) as routing:
            sides.append(float(model(**batch(1, 6)).logits.double().pow(2).mean()))
            assert not routing.take()[last].changed.any()
    slope = (sides[0] - sides[1]) / 6e-3
    assert slope == pytest.approx(float(delta.grad[expert]), rel=0.02, abs=1e-4)


def test_a_shifted_expert_is_chosen_with_the_weight_of_its_new_logit() -> None:
    model = build("mixtral")

    def change(ids: Tensor, weights: Tensor, logits: Tensor) -> Any:
        scores = (logits + torch.tensor([4.0] + [0.0] * (logits.shape[1] - 1))).softmax(-1)
        experts = [row.topk(2).indices.tolist() for row in scores]
        return experts, [_gate("mixtral", scores[token], chosen) for token, chosen in enumerate(experts)]

    with by_hand(model, change):
        wanted = run(model)
    delta = torch.zeros(8)
    delta[0] = 4.0
    with rerouted(model, Bias(delta)) as routing:
        near(run(model), wanted, 1e-5)
    assert float(torch.cat([one.changed for one in routing.take().values()]).float().mean()) > 0.2
    with pytest.raises(ModelError, match="layer 0.*bias of 5 numbers"), rerouted(model, Bias(torch.zeros(5))):
        run(model)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_called_otherwise_are_refused_by_name(family: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[family]), rerouted(build(family), Ratio(0.5)):
        pass


@pytest.mark.parametrize("family", DROPS_ONLY)
def test_where_no_gate_is_known_rules_may_still_drop(family: str) -> None:
    model = build(family)
    with by_hand(model, _ratio):
        wanted = run(model)
    with rerouted(model, Ratio(0.6)):
        near(run(model), wanted, 1e-5)
    with pytest.raises(ModelError, match=DROPS_ONLY[family]), rerouted(model, TopK(3)):
        run(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_router_that_cheats_is_found_out() -> None:
    model = build("mixtral")
    router: Any = find_moe_layers(model)[1].router
    handle = router.register_forward_hook(lambda module, args, out: (out[0], out[1], (out[2] + 1) % 8))
    reason = r"layer 1 \(MixtralExperts\).*experts from its scores"
    with pytest.raises(ModelError, match=reason), rerouted(model, TopK(3)):
        run(model)
    handle.remove()


@pytest.mark.parametrize("family", KINDS)
def test_one_token_is_enough_where_factors_are_known(family: str) -> None:
    model = build(family)
    with torch.no_grad(), rerouted(model, TopK(3)) as routing:
        model(input_ids=torch.tensor([[5]]))
    assert {(gate.score, gate.renormalized, gate.scale) for gate in routing.gates.values()} == {KINDS[family]}


def test_bfloat16_gates_are_known_too() -> None:
    for family in ("mixtral", "deepseek_v3", "gpt_oss"):
        model = build(family, dtype=torch.bfloat16)
        with rerouted(model, TopK(3)) as routing:
            run(model)
        assert {(gate.score, gate.renormalized) for gate in routing.gates.values()} == {KINDS[family][:2]}
        assert {gate.scale for gate in routing.gates.values()} == {KINDS[family][2]}


def test_generating_with_a_cache_follows_the_rule_at_every_step() -> None:
    model = build("olmoe")
    inputs = {name: value[:1] for name, value in batch(1, 6).items()}
    with rerouted(model, TopP(0.5)) as routing:
        text = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
        taken = routing.take()[0, 0]
        again = model(text[:, :-1]).logits[0, 5:].argmax(-1)
        whole = routing.take()[0, 0]
    assert torch.equal(again, text[0, 6:]) and torch.equal(taken.active, whole.active)


def test_what_is_recorded_is_what_the_experts_ran(tmp_path: Path) -> None:
    model = build("olmoe")
    inputs = batch(2, 10)
    real = inputs["attention_mask"].reshape(-1).bool()
    with rerouted(model, TopP(0.6)) as routing:
        watch = profiler.watch(model, name="routed", store=tmp_path, level="activations")
        with watch as session, torch.no_grad(), recorded_calls(model) as calls:
            model(**inputs)
        taken = routing.take()
    assert session.path is not None
    found = store.open_run(session.path)
    load = found.table("expert_load")
    for call in calls:
        layer, ran = call.layer.layer, call.weights[0] != 0
        counts = torch.bincount(call.ids[0][real][ran[real]], minlength=8)
        rows = load.filter(load["layer"] == layer).sort("expert")
        own = dict(zip(rows["expert"].to_list(), rows["tokens"].to_list(), strict=True))
        assert [own.get(expert, 0) for expert in range(8)] == counts.tolist()
        assert int(taken[layer, 0].active[real].sum()) == int(counts.sum())
    checks = found.table("check")
    assert not checks.filter(checks["status"].is_in(["fail", "warning"])).height
    assert "TopP(p=0.6" in found.info.settings["rerouted"][0]


def test_a_model_is_rerouted_once_and_layers_are_named() -> None:
    model = build("olmoe")
    with rerouted(model, {(1, 0): TopK(1)}) as routing:
        run(model)
        assert list(routing.take()) == [(1, 0)]
        with pytest.raises(ModelError, match="layer 1 .*rerouted already"), rerouted(model, TopK(1)):
            pass
    with pytest.raises(ModelError, match="no MoE layer 9"), rerouted(model, {(9, 0): TopK(1)}):
        pass
    with pytest.raises(ModelError, match="layer 0 .*8 experts per token cannot choose 9"), rerouted(model, TopK(9)):
        run(model)
