"""What-if routing against plain loops over the tokens: ties, tokens with fewer experts or none, experts not stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

import store
from planner.simulate.what_if import METHODS, Refused, WhatIf, advice, what_if
from planner.simulate.what_if.blocks import Scores, Subject
from planner.simulate.what_if.choosing import probabilities
from planner.simulate.what_if.outcome import quantile
from planner.simulate.what_if.sinkhorn import batches
from planner.simulate.what_if.smoothing import TEMPERATURE, WINDOW
from profiler.headline import compute_and_store
from tests.planner.sent import Sent

EXPERTS, TOP_K = 12, 3
LENGTHS = [60, 0, 33, 7]
HIDDEN, WIDTH = 8, 5


def _write(
    folder: Path, *, stored: int = EXPERTS, top_k: int = TOP_K, layers: int = 2, scored: list[int] | None = None,
    biased: bool = False,
) -> store.Run:  # fmt: skip
    """Layers of a router with ties; every fifth token uses an expert less, every eleventh none."""
    sequence = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    position = np.concatenate([np.arange(length) for length in LENGTHS])
    place: dict[str, Any] = {"sequence": sequence, "position": position}
    frames: dict[str, list[pl.DataFrame]] = {"route_chunk": [], "score_chunk": []}
    for layer in range(layers):
        rng = np.random.default_rng(layer)
        logits = np.round(rng.normal(size=(len(sequence), EXPERTS)) * 1.5 + rng.normal(size=EXPERTS), 1)
        order = np.argsort(-logits, axis=1, kind="stable")
        by_choice = np.argsort(-(logits + 3 * rng.normal(size=EXPERTS) * biased), axis=1, kind="stable")
        value = np.take_along_axis(logits, order, 1)
        total = np.log(np.exp(logits).sum(1))
        ids = by_choice[:, :top_k].copy()
        weights = np.exp(np.take_along_axis(logits, ids, 1) - total[:, None])
        if biased:
            rank = np.argsort(-weights, axis=1, kind="stable")
            ids, weights = (np.take_along_axis(one, rank, 1) for one in (ids, weights))
        if top_k > 1:
            ids[::5, top_k - 1] = -1
            ids[::11] = -1
        weights = np.where(ids >= 0, weights, 0.0)
        frames["route_chunk"].append(
            store.pack_trace(layer=layer, ids=ids, weights=weights, num_experts=EXPERTS, **place)
        )
        if scored is None or scored:
            kept = np.isin(sequence, scored) if scored else np.ones(len(sequence), bool)
            frames["score_chunk"].append(
                store.pack_scores(
                    layer=layer,
                    ids=order[kept, :stored],
                    logits=value[kept, :stored],
                    log_partition=total[kept],
                    sequence=sequence[kept],
                    position=position[kept],
                )  # fmt: skip
            )
    writer = store.RunWriter.create(folder, "mine", store.RunInfo(model="toy", hidden_size=HIDDEN))
    writer.write_shard(
        {name: pl.concat(parts) for name, parts in frames.items() if parts}
        | {
            "layer": {
                "layer": [*range(layers)], "step": [0] * layers, "num_experts": [EXPERTS] * layers,
                "top_k": [top_k] * layers, "expert_width": [WIDTH] * layers,
            },
            "sequence": {
                "sequence": [*range(len(LENGTHS))], "domain": ["a", "a", "a", "b"], "tokens": LENGTHS,
            },
        }
    )  # fmt: skip
    return store.open_run(writer.finish(seconds=1.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return _write(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """Scores of five experts, of one sequence with tokens of each domain."""
    return _write(tmp_path_factory.mktemp("part"), stored=5, scored=[0, 3])


class Token:
    """One token of one layer, in plain lists."""

    def __init__(self, ids: Any, weights: Any, scored: Any = (), logits: Any = (), total: float = 0.0) -> None:
        keep = [rank for rank, one in enumerate(ids) if one >= 0]
        self.ids, self.weights = [int(ids[rank]) for rank in keep], [float(weights[rank]) for rank in keep]
        self.scored = [int(one) for one in scored if one >= 0]
        self.logits = [float(one) for one in logits][: len(self.scored)]
        self.probabilities = [float(np.exp(one - float(total))) for one in self.logits]
        self.own = len(self.ids)

    @property
    def largest(self) -> list[int]:
        return self.scored[: self.own]


def _tokens(run: store.Run, layer: int, *, scored: bool) -> tuple[list[Token], list[tuple[int, int]]]:
    """Tokens that used an expert, with (sequence, position) of each."""
    read = run.layer_selections(layer=layer, weights=True)
    assert read.weights is not None
    found = run.layer_scores(layer=layer)
    tokens, places = [], []
    for index, number in enumerate(read.sequences.tolist()):
        if scored and number not in found.sequences:
            continue
        begin = found.offsets[found.sequences.tolist().index(number)] if scored else 0
        for position in range(read.offsets[index + 1] - read.offsets[index]):
            at = read.offsets[index] + position
            if read.ids[at, 0] < 0:
                continue
            more = begin + position
            extra = (found.ids[more], found.logits[more], found.log_partition[more]) if scored else ()
            tokens.append(Token(read.ids[at], read.weights[at], *extra))
            places.append((number, position))
    return tokens, places


def _check(found: WhatIf, run: store.Run, *, scored: bool, choose: Any, mass: Any, before: Any) -> None:
    """Every figure of a result against ``choose(token, value)``."""
    cost = 6.0 * HIDDEN * WIDTH
    for axis, (layer, _) in enumerate(found.layers):
        tokens, _ = _tokens(run, layer, scored=scored)
        assert found.tokens[axis] == len(tokens)
        first = [before(token) for token in tokens]
        for index in range(len(found.values)):
            value = found.layer_values[index, axis]
            chosen = [choose(token, value) for token in tokens]
            load = np.bincount([one for ids in chosen for one in ids], minlength=EXPERTS)
            sizes = [len(ids) for ids in chosen]
            selections = sum(map(len, first))
            kept = sum(len(set(one) & set(ids)) for one, ids in zip(first, chosen, strict=True))
            at = (index, axis)
            assert_array_equal(found.load[at], load)
            assert found.mean_active[at] == pytest.approx(np.mean(sizes))
            assert found.p50_active[at] == sorted(sizes)[-(-len(sizes) // 2) - 1]
            assert found.p95_active[at] == sorted(sizes)[int(np.ceil(0.95 * len(sizes))) - 1]
            assert found.kept_mass[at] == pytest.approx(
                np.mean([mass(token, ids) for token, ids in zip(tokens, chosen, strict=True)]), abs=1e-6
            )
            changed = [set(one) != set(ids) for one, ids in zip(first, chosen, strict=True)]
            assert found.changed_tokens[at] == pytest.approx(np.mean(changed))
            assert found.dropped[at] == pytest.approx(1 - kept / selections)
            assert found.added[at] == pytest.approx((sum(sizes) - kept) / selections)
            assert found.flops[at] == pytest.approx(np.mean(sizes) * cost)
            assert found.flops_share[at] == pytest.approx(sum(sizes) / selections)
            if load.sum():
                assert found.load_cv[at] == pytest.approx(load.std() / load.mean())
                assert found.load_peak[at] == pytest.approx(load.max() / load.mean())
        assert found.mean_active_before[axis] == pytest.approx(np.mean([len(one) for one in first]))


def _gate_mass(token: Token, ids: list[int]) -> float:
    return sum(token.weights[token.ids.index(one)] for one in ids) / sum(token.weights)


def _probability(token: Token, ids: list[int]) -> float:
    return sum(token.probabilities[token.scored.index(one)] for one in ids)


def _above(token: Token, rank: int) -> float:
    return sum(token.weights[:rank]) / sum(token.weights)


def _own(token: Token) -> list[int]:
    return token.ids


RULES: dict[str, Any] = {
    "ratio": lambda token, beta: [
        one for one, weight in zip(token.ids, token.weights, strict=True) if weight / token.weights[0] >= beta
    ],
    "threshold": lambda token, tau: [
        one for one, weight in zip(token.ids, token.weights, strict=True) if weight >= tau
    ],
    "tiers": lambda token, _: [one for rank, one in enumerate(token.ids) if _above(token, rank) <= 0.8],
}


@pytest.mark.parametrize("name", RULES)
def test_rules_on_gate_weights(run: store.Run, name: str) -> None:
    values = [0.5, 0.0, 0.25, 0.3, 1.0] if name != "threshold" else [0.5, 0.0, 0.05, 0.3, 4.0]
    found = what_if(run, name, values=values, skip_above=0.8)
    assert found.certainty == "exact" and np.isnan(found.own_choice).all()
    _check(found, run, scored=False, choose=RULES[name], mass=_gate_mass, before=_own)


def test_tiers_share_and_bits(run: store.Run) -> None:
    found = what_if(run, "tiers", values=[0.3, 0.7, 0.95], skip_above=0.8, bits=(8.0, 3.0))
    for axis, (layer, _) in enumerate(found.layers):
        tokens, _ = _tokens(run, layer, scored=False)
        for index, value in enumerate(found.values):
            tier = [
                "high" if _above(token, rank) <= min(value, 0.8) else "low" if _above(token, rank) <= 0.8 else "skipped"
                for token in tokens
                for rank in range(token.own)
            ]
            share = [weight / sum(token.weights) for token in tokens for weight in token.weights]
            for name in ("high", "low", "skipped"):
                assert found.figures[f"{name}_share"][index, axis] == pytest.approx(tier.count(name) / len(tier))
            bits = np.array([{"high": 8.0, "low": 3.0, "skipped": np.nan}[one] for one in tier])
            loaded = ~np.isnan(bits)
            assert found.figures["bits_traffic"][index, axis] == pytest.approx(bits[loaded].mean())
            seen = np.average(bits[loaded], weights=np.array(share)[loaded])
            assert found.figures["bits_seen"][index, axis] == pytest.approx(seen)
    assert (found.figures["bits_stored"] == 11).all()


def _top_p(token: Token, p: float) -> list[int]:
    """The published rule: k = min(E, 1 + #{C_j <= p})."""
    reached = np.minimum(np.cumsum(token.probabilities), 1.0)
    return token.scored[: min(EXPERTS, 1 + int((reached <= p).sum()))]


def test_rules_on_all_scores(run: store.Run) -> None:
    of: dict[str, Any] = {"scored": True, "mass": _probability, "before": lambda token: token.largest}
    found = what_if(run, "top_p", values=[0.0, 0.3, 0.6, 0.9, 0.99, 1.0])
    _check(found, run, choose=_top_p, **of)
    assert found.certainty == "exact" and (found.own_choice == 1).all()
    assert (found.mean_active[-1] == EXPERTS).all() and (found.mean_active[0] == 1).all()
    found = what_if(run, "top_k", values=[1, 2, 3, 7, 12])
    _check(found, run, choose=lambda token, k: token.scored[: int(k)], **of)
    assert found.mean_active[:, 0].tolist() == [1, 2, 3, 7, 12]
    found = what_if(run, "top_k")
    assert found.values.tolist() == [*range(1, TOP_K + 9)]


def test_released_top_p_on_known_probabilities(tmp_path: Path) -> None:
    """Probabilities 0.5, 0.25, 0.125, 0.125: a border that is met exactly takes one more."""
    share = np.array([0.5, 0.25, 0.125, 0.125])
    place: dict[str, Any] = {"sequence": np.zeros(1, int), "position": np.zeros(1, int)}
    ids = np.array([[2, 0, 1, 3]])
    writer = store.RunWriter.create(tmp_path, "one", store.RunInfo(model="toy"))
    writer.write_shard(
        {
            "route_chunk": store.pack_trace(layer=0, ids=ids, weights=share[None], num_experts=4, **place),
            "layer": {"layer": [0], "step": [0], "num_experts": [4], "top_k": [4]},
            "sequence": {"sequence": [0], "domain": ["a"], "tokens": [1]},
        }
    )
    with store.open_run(writer.finish(seconds=1.0)) as run:
        found = what_if(run, "top_p", values=[0.0, 0.49, 0.51, 0.74, 0.76, 0.89, 1.0])
    assert found.mean_active[:, 0].tolist() == [1, 1, 2, 2, 3, 4, 4]
    assert found.certainty == "proxy" and "without router scores" in found.why.lower()


def test_what_is_not_stored_is_said(part: store.Run) -> None:
    found = what_if(part, "top_p", values=[0.3, 0.9, 0.999])
    assert found.run_tokens == sum(LENGTHS) and any("Rests on" in note for note in found.notes)
    for axis, (layer, _) in enumerate(found.layers):
        tokens, _ = _tokens(part, layer, scored=True)
        for index, value in enumerate(found.values):
            reached = [sum(token.probabilities) > value for token in tokens]
            assert found.known[index, axis] == pytest.approx(np.mean(reached))
            assert found.mean_active[index, axis] == pytest.approx(
                np.mean([len(_top_p(token, value)) for token in tokens])
            )
    assert found.certainties[0] == "exact" and found.certainties[-1] == "needs a live run"
    assert what_if(part, "top_k", values=[5, 6]).certainties == ("exact", "needs a live run")
    with pytest.raises(Refused, match="scores of all 12 experts.*keeps 5"):
        what_if(part, "sinkhorn")
    with pytest.raises(Refused, match="has no domain 'c'"):
        what_if(part, "top_p", domain="c")


@pytest.mark.parametrize("stored", [EXPERTS, 5])
def test_null_experts(run: store.Run, part: store.Run, stored: int) -> None:
    of = run if stored == EXPERTS else part

    def choose(token: Token, b: float) -> list[int]:
        return [one for one in token.ids if token.logits[token.scored.index(one)] > b]

    tokens, _ = _tokens(of, 0, scored=True)
    tie = tokens[3].logits[1]  # a logit that does not stay, since it is not above itself
    found = what_if(of, "null_experts", values=[-9.0, tie, 0.5, 9.0])
    _check(found, of, scored=True, choose=choose, mass=_gate_mass, before=_own)
    assert found.certainty == "exact"
    reached = what_if(of, "null_experts", values=[0.5, 1.5, 2.5], fitted=True)
    assert_allclose(reached.mean_active, np.repeat(reached.values[:, None], 2, 1), atol=0.5)


def test_bias_is_exact_with_all_scores_and_proven_with_some(run: store.Run, part: store.Run) -> None:
    delta = np.random.default_rng(5).normal(size=EXPERTS)

    def choose(token: Token, scale: float) -> list[int]:
        shifted = -np.array([logit + scale * delta[one] for one, logit in zip(token.scored, token.logits, strict=True)])
        return [token.scored[place] for place in np.argsort(shifted, kind="stable")[: token.own]]

    vectors = {(0, 0): delta, (1, 0): delta}
    found = what_if(run, "bias", values=[0.0, 0.5, -1.0], bias=vectors)
    of: dict[str, Any] = {"scored": True, "mass": _probability, "before": lambda token: token.largest}
    _check(found, run, choose=choose, **of)
    assert found.certainty == "exact" and (found.changed_tokens[0] == 0).all()
    found = what_if(part, "bias", values=[0.0, 0.5, -1.0], bias=vectors)
    _check(found, part, choose=choose, **of)
    whole, _ = _tokens(run, 0, scored=True)
    there, places = _tokens(part, 0, scored=True)
    numbered = dict(zip(_tokens(run, 0, scored=True)[1], whole, strict=True))
    for index, scale in enumerate(found.values):
        proven = []
        for token, place in zip(there, places, strict=True):
            least = min(logit + scale * delta[one] for one, logit in zip(token.scored, token.logits, strict=True)
                        if one in choose(token, scale))  # fmt: skip
            others = max(scale * delta[one] for one in range(EXPERTS) if one not in token.scored)
            proven.append(token.logits[-1] + others < least)
            if proven[-1]:  # what is called proven is so
                assert set(choose(token, scale)) == set(choose(numbered[place], scale))
        assert found.known[index, 0] == pytest.approx(np.mean(proven))
    only = what_if(run, "bias", bias={(1, 0): delta})
    assert only.layers == [(1, 0)]


@pytest.mark.parametrize("stored", [EXPERTS, 5])
def test_smoothing(run: store.Run, part: store.Run, stored: int) -> None:
    of = run if stored == EXPERTS else part
    found = what_if(of, "smoothing", values=[1.0, 0.6], layers=[0])
    assert found.certainty == "proxy" and found.changed_tokens[0, 0] == 0
    assert_allclose(found.figures["entropy"][0], found.figures["entropy_before"][0], rtol=1e-5)
    tokens, places = _tokens(of, 0, scored=True)
    dense = np.array([_dense(token) for token in tokens])
    logits = np.log(dense) - np.log(dense).mean(1, keepdims=True)
    logits /= np.linalg.norm(logits, axis=1, keepdims=True)
    load, entropy, shared, pairs = np.zeros(EXPERTS, int), 0.0, 0, 0
    last: tuple[int, list[int]] = (-1, [])
    for at, (token, (number, _)) in enumerate(zip(tokens, places, strict=True)):
        before = [other for other in range(max(at - WINDOW, 0), at) if places[other][0] == number]
        mixed = dense[at]
        if before:
            weight = np.exp((logits[before] @ logits[at] - 1) / TEMPERATURE)
            mixed = 0.6 * dense[at] + 0.4 * (weight / weight.sum()) @ dense[before]
        entropy -= float((mixed * np.log(mixed)).sum())
        chosen = np.argsort(-mixed, kind="stable")[: token.own].tolist()
        np.add.at(load, chosen, 1)
        if last[0] == number:
            shared, pairs = shared + len(set(chosen) & set(last[1])), pairs + token.own
        last = (number, chosen)
    assert found.figures["entropy"][1, 0] == pytest.approx(entropy / len(tokens), rel=1e-4)
    assert np.abs(found.load[1, 0] - load).sum() <= 4  # ties within the rounding of 32 bits
    assert found.figures["same_expert"][1, 0] == pytest.approx(shared / pairs, abs=0.02)


def _dense(token: Token) -> NDArray[np.float64]:
    """Probabilities of all experts; what is not stored is spread evenly."""
    rest = max(1 - sum(token.probabilities), 0.0) / max(EXPERTS - len(token.scored), 1)
    dense = np.full(EXPERTS, rest)
    dense[token.scored] = token.probabilities
    return dense


def test_sinkhorn(run: store.Run) -> None:
    found = what_if(run, "sinkhorn", values=[32, 1000])
    assert (found.figures["marginal_error"] < 1e-6).all() and any("Not causal" in note for note in found.notes)
    for axis, (layer, _) in enumerate(found.layers):
        tokens, _ = _tokens(run, layer, scored=True)
        logits = np.array([[dict(zip(t.scored, t.logits, strict=True))[e] for e in range(EXPERTS)] for t in tokens])
        for index, size in enumerate((32, 1000)):
            load = np.zeros(EXPERTS, int)
            for first, last in batches(len(tokens), size):
                part, columns = logits[first:last], np.zeros(EXPERTS)
                for _ in range(2000):  # in the logarithm: rows to 1, columns to tokens / E
                    rows = -np.log(np.exp(part + columns).sum(1))
                    columns = np.log((last - first) / EXPERTS) - np.log(np.exp(part + rows[:, None]).sum(0))
                plan = part + rows[:, None] + columns
                for token, values in zip(tokens[first:last], plan, strict=True):
                    np.add.at(load, sorted(range(EXPERTS), key=lambda one: -values[one])[: token.own], 1)
            assert np.abs(found.load[index, axis] - load).sum() <= 4  # ties of rounded logits
    assert (found.load_cv < found.load_cv_before).all()
    assert_allclose(found.figures["overlap"], 1 - found.dropped)
    assert batches(10, 4) == [(0, 4), (4, 8), (8, 10)] and batches(9, 4) == [(0, 4), (4, 9)]


def test_a_router_that_chooses_otherwise_is_a_proxy(tmp_path: Path) -> None:
    with _write(tmp_path, biased=True) as run:
        found = what_if(run, "top_p", values=[0.5])
        tokens, _ = _tokens(run, 0, scored=True)
        equal = [
            min(token.logits[token.scored.index(one)] for one in token.ids)
            >= max(logit for one, logit in zip(token.scored, token.logits, strict=True) if one not in token.ids)
            for token in tokens
        ]
        assert found.own_choice[0] == pytest.approx(np.mean(equal)) and np.mean(equal) < 0.9
        assert found.certainty == "proxy" and "not those of the largest logits" in found.why
        assert what_if(run, "ratio", values=[0.5]).certainty == "exact"


def test_rounding_counts_tokens_near_a_border(run: store.Run) -> None:
    found = what_if(run, "threshold", values=[0.1, 0.3])
    for axis, (layer, _) in enumerate(found.layers):
        read = run.layer_selections(layer=layer, weights=True)
        assert read.weights is not None and read.rounding is not None
        used = read.ids[:, 0] >= 0
        for index, value in enumerate(found.values):
            near = (np.abs(read.weights.astype(float) - value) < read.rounding[:, None]) & (read.ids >= 0)
            assert found.rounding[index, axis] == pytest.approx(near.any(1)[used].mean(), abs=0.01)


def test_odp_finds_medians_on_the_other_half(run: store.Run) -> None:
    found = what_if(run, "ratio", values=[1.0], fitted=True)
    for axis, (layer, _) in enumerate(found.layers):
        fitting = run.layer_selections(layer=layer, sequences=[0, 2], weights=True)
        assert fitting.weights is not None
        two = fitting.ids[:, 1] >= 0
        assert found.layer_values[0, axis] == pytest.approx(
            np.median(fitting.weights[two, 1] / fitting.weights[two, 0]), rel=1e-6
        )
    assert found.tokens.tolist() == [len([p for p in _tokens(run, 0, scored=False)[1] if p[0] in (1, 3)])] * 2


def test_what_no_value_is_found_for_stays(tmp_path: Path) -> None:
    """No second expert, and no score, in the half that fits: nothing is dropped in the half that judges."""
    ids, weights = np.array([[0, -1], [1, -1], [2, 3], [3, 0]]), np.array([[1.0, 0], [1, 0], [0.6, 0.4], [0.7, 0.3]])
    place: dict[str, Any] = {"sequence": np.array([0, 0, 1, 1]), "position": np.array([0, 1, 0, 1])}
    scored = {"ids": np.full((4, 4), 65535), "logits": np.zeros((4, 4)), "log_partition": np.full(4, np.nan)}
    scored["ids"][2:], scored["log_partition"][2:] = [[2, 3, 0, 1], [3, 0, 1, 2]], np.log(4)
    writer = store.RunWriter.create(tmp_path, "bare", store.RunInfo(model="toy", hidden_size=HIDDEN))
    writer.write_shard(
        {
            "route_chunk": store.pack_trace(layer=0, ids=ids, weights=weights, num_experts=4, **place),
            "score_chunk": store.pack_scores(layer=0, **scored, **place),
            "layer": {"layer": [0], "step": [0], "num_experts": [4], "top_k": [2]},
            "sequence": {"sequence": [0, 1], "domain": ["a", "a"], "tokens": [2, 2]},
        }
    )
    bare = store.open_run(writer.finish(seconds=1.0))
    for method in ("ratio", "null_experts"):
        assert_array_equal(what_if(bare, method, fitted=True, values=[1.0]).mean_active, [[2.0]])


def test_one_expert_per_token_has_nothing_to_skip(tmp_path: Path) -> None:
    with _write(tmp_path, top_k=1) as run:
        for method in METHODS:
            if method.skips:
                with pytest.raises(Refused, match="one expert per token"):
                    what_if(run, method.name)
        assert what_if(run, "top_k", values=[1, 2]).mean_active[:, 0].tolist() == [1, 2]
        assert [row.suggest for row in advice(run) if row.name == "top_k" and row.holds] == [
            "width allocation, expert pruning"
        ]


def test_what_is_missing_is_refused(run: store.Run, tmp_path: Path) -> None:
    with _write(tmp_path, scored=[]) as bare:
        for name in ("null_experts", "bias", "smoothing", "sinkhorn"):
            with pytest.raises(Refused, match="no router scores: collect it again with --router-scores"):
                what_if(bare, name, bias={(0, 0): np.zeros(EXPERTS)})
        with pytest.raises(Refused, match="k = 4 is more than the 3 experts that are recorded"):
            what_if(bare, "top_k", values=[4])
        assert what_if(bare, "top_k").values.tolist() == [1, 2, 3]
    for wrong, words in (
        ({"method": "top_q"}, "no method 'top_q'"),
        ({"method": "ratio", "values": [1.5]}, "1.5 must lie within 0 to 1"),
        ({"method": "top_k", "values": [1.5]}, "whole numbers"),
        ({"method": "ratio", "values": []}, "one or more numbers"),
        ({"method": "ratio", "layers": [9]}, "no MoE layer 9"),
        ({"method": "bias"}, "needs a vector"),
        ({"method": "bias", "bias": {(0, 0): np.zeros(3)}}, "must be 12 finite numbers"),
        ({"method": "tiers", "skip_above": 1.5}, "T2 is 1.5"),
        ({"method": "top_p", "fitted": True}, "fitted is for ratio and null_experts"),
    ):
        with pytest.raises(Refused, match=words):
            what_if(run, **wrong)


def test_blocks_add_up(run: store.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {(0, 0): np.linspace(-1, 1, EXPERTS)}
    whole = {name: what_if(run, name, bias=vectors) for name in ("top_p", "tiers", "bias", "smoothing", "ratio")}
    monkeypatch.setattr("planner.simulate.what_if.trial.BLOCK_TOKENS", 10)
    for name, expected in whole.items():
        told: list[str] = []
        found = what_if(run, name, bias=vectors, tell=told.append)
        assert len(told) == len(found.layers) and told[-1].endswith(f"layer {len(told)} of {len(told)}")
        assert_array_equal(found.load, expected.load)
        assert_array_equal(found.counts, expected.counts)
        assert_allclose(found.kept_mass, expected.kept_mass)
        for figure, values in expected.figures.items():
            assert_allclose(found.figures[figure], values, rtol=1e-6)


def test_layers_on_workers_are_those_of_one_process(run: store.Run) -> None:
    vectors = {(0, 0): np.arange(EXPERTS) / 4.0}
    for method in METHODS:
        sent, asked = Sent(), {"bias": vectors} if method.name == "bias" else {}
        fitted = method.name in ("ratio", "null_experts")
        alone = what_if(run, method.name, **asked, fitted=fitted)
        shared = what_if(run, method.name, **asked, fitted=fitted, cluster=cast(Any, sent))
        assert sent.pieces == len(alone.layers)
        for field, value in vars(alone).items():
            if isinstance(value, np.ndarray):
                assert_array_equal(getattr(shared, field), value, err_msg=f"{method.name}.{field}")
            elif not isinstance(value, dict):
                assert getattr(shared, field) == value, (method.name, field)


def test_a_part_of_the_text(run: store.Run) -> None:
    assert what_if(run, "ratio", values=[0.5], domain="b").run_tokens == 7
    few = what_if(run, "ratio", values=[0.5], limit_tokens=40)
    assert 0 < few.tokens[0] < what_if(run, "ratio", values=[0.5]).tokens[0]


def test_quantiles_of_counts() -> None:
    counts = np.array([[0, 1, 2, 1], [0, 0, 0, 0]])
    assert_array_equal(quantile(counts, 0.5), [2, np.nan])
    assert_array_equal(quantile(counts, 0.76), [3, np.nan])


def test_advice_reads_what_is_there(run: store.Run) -> None:
    rows = {row.name: row for row in advice(run)}
    medians = what_if(run, "ratio", values=[1.0], fitted=True).layer_values
    assert {"top_k", "weight_ratio", "mass_95"} <= rows.keys()
    assert rows["weight_ratio"].observed == pytest.approx(medians.mean(), abs=0.15)
    assert rows["weight_ratio"].holds == (rows["weight_ratio"].observed < 0.5)
    assert rows["mass_95"].observed == pytest.approx(what_if(run, "top_p", values=[0.95]).mean_active.mean(), rel=1e-6)
    assert not rows["top_k"].holds


@pytest.mark.parametrize(("follows", "told"), [(0.0, False), (0.9, True)])
def test_what_few_tokens_make_of_nothing_is_no_advice(tmp_path: Path, follows: float, told: bool) -> None:
    """500 tokens of 64 experts: the plain estimate finds half of a choice in another that has nothing to do with it."""
    rng, experts, tokens = np.random.default_rng(0), 64, 500
    first, other = rng.integers(experts, size=(2, tokens))
    second = np.where(rng.random(tokens) < follows, first, other)
    place: dict[str, Any] = {"sequence": np.repeat(np.arange(10), 50), "position": np.tile(np.arange(50), 10)}
    chunks, loads = [], []
    for layer, ids in enumerate((first, second)):
        weights = np.ones((tokens, 1))
        chunks.append(store.pack_trace(layer=layer, ids=ids[:, None], weights=weights, num_experts=experts, **place))
        expert, count = np.unique(ids, return_counts=True)
        loads.append(pl.DataFrame({"layer": layer, "step": 0, "expert": expert, "kind": "routed", "tokens": count}))
    writer = store.RunWriter.create(tmp_path, "few", store.RunInfo(model="toy", hidden_size=HIDDEN))
    layer_rows = {"layer": [0, 1], "step": [0] * 2, "num_experts": [experts] * 2, "top_k": [1] * 2}
    shard = {"route_chunk": pl.concat(chunks), "layer": layer_rows}
    load = pl.concat(loads).with_columns(pl.lit("a").alias("domain"), pl.lit("prompt").alias("phase"))
    writer.write_shard(
        shard | {"expert_load": load, "sequence": {"sequence": [*range(10)], "domain": ["a"] * 10, "tokens": [50] * 10}}
    )
    path = writer.finish(seconds=1.0)
    compute_and_store(path)
    found = {row.name: row for row in advice(store.open_run(path))}["memory"]
    assert found.holds is told and (found.observed < 0.1) is not told


def test_probabilities_of_logits_far_apart_do_not_exceed_one() -> None:
    logits = np.array([[50_000.0, 49_999.5], [3.0, 1.0]], np.float32)
    # 16 bits over such a range are steps of a logit and more, so that the logsumexp, which is exact, does not fit.
    scores = Scores(np.array([[0, 1], [0, 1]], np.int16), logits, np.array([49_999.0, 3.5], np.float32))
    found = probabilities(scores)
    assert found[0].sum() == pytest.approx(1.0) and found[0, 0] / found[0, 1] == pytest.approx(np.exp(0.5))
    assert_allclose(found[1], np.exp([-0.5, -2.5]))


def test_halves_hold_domains_that_take_turns() -> None:
    table = pl.DataFrame({"sequence": [*range(8)], "domain": ["a", "b"] * 4, "tokens": [5] * 8})
    halves = Subject(cast(Any, None), (), table, 40, False, True).halves()
    assert [half.sequences["sequence"].to_list() for half in halves] == [[0, 1, 4, 5], [2, 3, 6, 7]]
