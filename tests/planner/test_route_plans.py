"""Plans that change routing: what they say of the trace, against brute force; what is refused; balance by biases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import store
from compressor.plan import Plan
from moescope.errors import PlanError
from planner.route import balance, balanced, make
from planner.route.shift import load, rerouted, variation
from store import LayerInfo, RunInfo, RunWriter
from store.scores import pack_scores
from store.trace import pack_trace

LAYERS, SEQUENCES, TOKENS, EXPERTS, TOP_K, STORED = (0, 1), 8, 96, 8, 2, 8
HIDDEN, WIDTH = 16, 24


def logits(seed: int = 0) -> np.ndarray:
    """(layers, sequences, tokens, E): each expert has a popularity of its own, so that load is uneven."""
    rng = np.random.default_rng(seed)
    shape = (len(LAYERS), SEQUENCES, TOKENS, EXPERTS)
    return rng.normal(size=shape) + np.linspace(1.2, 0.0, EXPERTS)


def write(directory: Path, *, scored: bool = True, top_k: int = TOP_K, loud: tuple[int, int] | None = None) -> Path:
    """A run of known logits; loud: (layer, expert) that puts out far more than all others."""
    info = RunInfo(
        model="tiny", model_type="mixtral", num_layers=2, hidden_size=HIDDEN, dtype="float32",
        levels="routing,activations" if loud else "routing", sequences=SEQUENCES, tokens=SEQUENCES * TOKENS,
    )  # fmt: skip
    writer = RunWriter.create(directory, "known", info)
    values = logits()
    sequence = np.repeat(np.arange(SEQUENCES), TOKENS)
    position = np.tile(np.arange(TOKENS), SEQUENCES)
    chunks, scores = [], []
    for axis, layer in enumerate(LAYERS):
        rows = values[axis].reshape(-1, EXPERTS)
        order = np.argsort(-rows, axis=1)
        gates = np.exp(np.take_along_axis(rows, order, 1)) / np.exp(rows).sum(1, keepdims=True)
        where = {"layer": layer, "sequence": sequence, "position": position}
        chunks.append(pack_trace(**where, ids=order[:, :top_k], weights=gates[:, :top_k], num_experts=EXPERTS))
        stored = order[:, :STORED]
        scores.append(
            pack_scores(
                **where, ids=stored, logits=np.take_along_axis(rows, stored, 1),
                log_partition=np.log(np.exp(rows).sum(1)),
            )
        )  # fmt: skip
    domains = ["code" if number % 4 < 2 else "text" for number in range(SEQUENCES)]
    frames = {
        "layer": pl.DataFrame(
            [vars(LayerInfo(layer, 0, "m", "E", "R", EXPERTS, top_k, 0, WIDTH)) for layer in LAYERS]
        ),
        "sequence": pl.DataFrame(
            {
                "sequence": range(SEQUENCES), "domain": domains, "source": ["s"] * SEQUENCES,
                "tokens": [TOKENS] * SEQUENCES, "prompt_tokens": [TOKENS] * SEQUENCES,
            }
        ),
        "route_chunk": pl.concat(chunks),
    }  # fmt: skip
    if scored:
        frames["score_chunk"] = pl.concat(scores)
    writer.write_shard(frames)
    return writer.finish(seconds=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return store.open_run(write(tmp_path_factory.mktemp("runs")))


def chosen(values: np.ndarray, bias: np.ndarray | float = 0.0) -> list[set[int]]:
    """The experts of every token of one layer, by sorting all of them."""
    rows = (values + bias).reshape(-1, EXPERTS)
    return [set(np.argsort(-row, kind="stable")[:TOP_K].tolist()) for row in rows]


def test_a_bias_does_what_sorting_all_logits_does(run: store.Run) -> None:
    bias = np.zeros(EXPERTS)
    bias[5], bias[0] = 1.5, -0.75
    plan = make(run, rule="bias", biases={(1, 0): bias.tolist()})
    now, then = chosen(logits()[1]), chosen(logits()[1], bias)
    count = np.bincount([expert for one in then for expert in one], minlength=EXPERTS)
    evidence = plan.evidence[0]
    assert [(one.layer, one.step) for one in evidence.layers] == [(1, 0)]
    assert np.abs(np.array(evidence.layers[0].values) - count).sum() <= 4  # logits are stored in 16 bits
    changed = np.mean([a != b for a, b in zip(now, then, strict=True)])
    assert any(f"{changed:.1%} of the tokens get other experts" in note for note in evidence.notes)
    assert plan.estimate.active_parameters_after == plan.estimate.active_parameters
    assert plan.route is not None and plan.route.layers[0].bias == tuple(bias)
    assert Plan.parse(plan.text()) == plan and make(run, rule="bias", biases={(1, 0): bias.tolist()}) == plan


@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_a_ratio_counts_the_experts_that_stay(run: store.Run, beta: float) -> None:
    gates = np.sort(np.exp(logits()), axis=-1)[..., ::-1][..., :TOP_K]
    active = (gates >= beta * gates[..., :1]).sum(-1).mean((1, 2))
    plan = make(run, rule="ratio", value=beta, weights="kept")
    told = [one.values[0] for one in plan.evidence[0].layers]
    assert told == pytest.approx(active, abs=0.02)  # gate weights are stored in 8 bits
    lost = (TOP_K - active).sum() * WIDTH * 3 * HIDDEN
    after = plan.estimate.active_parameters - plan.estimate.active_parameters_after
    assert after == pytest.approx(lost, abs=0.02 * 2 * WIDTH * 3 * HIDDEN)
    assert any("needs a live run" in note for note in plan.evidence[0].notes)


def test_values_differ_by_layer(run: store.Run) -> None:
    plan = make(run, rule="top_k", values={(0, 0): 1.0, (1, 0): 3.0})
    assert [one.values for one in plan.evidence[0].layers] == [(1.0,), (3.0,)]
    assert plan.estimate.active_parameters_after == plan.estimate.active_parameters  # one less, one more
    assert [one.value for one in plan.route.layers] == [1.0, 3.0]  # type: ignore[union-attr]


def test_a_run_without_scores_says_what_it_does_not_know(tmp_path: Path) -> None:
    with store.open_run(write(tmp_path, scored=False)) as bare:
        plan = make(bare, rule="null_experts", value=0.0)
        assert plan.evidence[0].layers == () and plan.estimate.kept_mass is None
        assert "router scores" in plan.evidence[0].notes[0]
        with pytest.raises(PlanError, match="router scores"):
            balance(bare)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rule": "odd", "value": 1.0}, "no rule 'odd'"),
        ({"rule": "top_p"}, "one value for all layers, or one per layer"),
        ({"rule": "top_p", "value": 1.5}, "within 0..1"),
        ({"rule": "top_k", "value": 2.5}, "no number of experts"),
        ({"rule": "top_k", "value": 9}, "has 8 experts, not 9"),
        ({"rule": "top_k", "value": TOP_K}, "nothing would change"),
        ({"rule": "ratio", "value": 0.5, "layers": [(7, 0)]}, "no MoE layer 7; it has 0, 1"),
        ({"rule": "ratio", "value": 0.5, "layers": []}, "no layer is named"),
        ({"rule": "ratio", "value": 0.5, "biases": {(0, 0): [0.0] * 8}}, "no biases"),
        ({"rule": "bias", "biases": {(0, 0): [1.0]}}, "takes 8 biases"),
        ({"rule": "bias", "biases": {(9, 0): [1.0] * 8}}, "no MoE layer 9"),
        ({"rule": "bias", "biases": {(0, 0): [1.0] * 8}}, "no bias changes anything"),
        ({"rule": "bias", "biases": {(0, 0): [float("nan"), *[0.0] * 7]}}, "no finite number"),
        ({"rule": "bias"}, "no bias changes anything"),
        ({"rule": "bias", "value": 1.0, "biases": {}}, "neither values nor layers"),
        ({"rule": "ratio", "value": 0.5, "weights": "odd"}, "weights 'odd'"),
        ({"rule": "ratio", "value": 0.5, "domains": ["odd"]}, "no domain 'odd'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(run: store.Run, asked: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message) as raised:
        make(run, **asked)
    assert "\n" not in str(raised.value)


def test_one_expert_per_token_leaves_none_to_skip(tmp_path: Path) -> None:
    with store.open_run(write(tmp_path, top_k=1)) as single:
        for rule in ("top_p", "ratio", "threshold", "null_experts"):
            with pytest.raises(PlanError, match="uses one expert per token"):
                make(single, rule=rule, value=0.5)  # type: ignore[arg-type]
        assert make(single, rule="top_k", value=2).evidence[0].layers[0].values == (2.0,)


def test_a_silenced_super_expert_is_refused(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.plan import Protected
    from planner import guard
    from planner.route import entry

    loud = guard.Guard(protected=(Protected(layer=0, expert=0, reason="loud"),), active=True)
    monkeypatch.setattr(entry, "guard_of", lambda run, wanted: loud if wanted else guard.Guard())
    silenced = {(0, 0): [-20.0, *[0.0] * 7]}
    with pytest.raises(PlanError, match="super expert 0 of layer 0 would keep 0 of"):
        make(run, rule="bias", biases=silenced)
    assert make(run, rule="bias", biases=silenced, guard=False).route is not None
    assert make(run, rule="bias", biases={(0, 0): [0.5, *[0.0] * 7]}).evidence[0].protected == loud.protected


def test_biases_even_out_text_that_they_were_not_fitted_on(run: store.Run) -> None:
    found = balanced(run, run.layers[0])
    assert found.after < 0.4 * found.before and found.fitted < 0.05
    assert found.bias.mean() == pytest.approx(0.0, abs=1e-9)
    # Judged by hand: the second, fourth ... sequence of each domain.
    judged = [number for number in range(SEQUENCES) if number % 2]
    counts = np.bincount(
        [expert for one in chosen(logits()[0, judged], found.bias) for expert in one], minlength=EXPERTS
    )
    assert variation(counts) == pytest.approx(found.after, abs=0.01)
    plan = balance(run, layers=[(0, 0)])
    assert plan.route is not None and [one.layer for one in plan.route.layers] == [0]
    assert "judged on the others" in plan.evidence[0].notes[0]


def test_layers_that_gain_are_chosen_on_the_text_that_judges_and_that_is_said(
    run: store.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 is made to lose: the plan leaves it, and says what biases in all layers would do."""
    real = balanced(run, run.layers[0])
    found = {0: real, 1: replace(real, key=(1, 0), before=0.2, after=0.5)}
    monkeypatch.setattr("planner.route.entry.balanced", lambda run, layer, **_: found[layer.layer])
    plan = balance(run)
    assert plan.route is not None and [one.layer for one in plan.route.layers] == [0]
    words = " ".join(plan.evidence[0].notes)
    assert f"goes from {real.before:.3f} to {real.after:.3f}" in words
    assert f"in all layers would go from {(real.before + 0.2) / 2:.3f} to {(real.after + 0.5) / 2:.3f}" in words


def test_what_is_not_stored_is_proven_or_not() -> None:
    rng = np.random.default_rng(3)
    values, bias = rng.normal(size=(400, EXPERTS)), rng.normal(size=EXPERTS)
    order = np.argsort(-values, axis=1)[:, :4].astype(np.int16)
    found = rerouted(order, np.take_along_axis(values, order.astype(int), 1), bias, top_k=TOP_K)
    whole = chosen(values, bias)
    right = np.array([set(row.tolist()) == one for row, one in zip(found.after, whole, strict=True)])
    assert right[found.proven].all() and 0.05 < found.proven.mean() < 1.0 and not right.all()
    changed = [a != b for a, b in zip(chosen(values), whole, strict=True)]
    assert (found.changed == np.array(changed))[found.proven].all()
    counts = load(order, np.take_along_axis(values, order.astype(int), 1), bias, top_k=TOP_K)
    assert counts.sum() == 400 * TOP_K
