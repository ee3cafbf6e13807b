"""Measures of single tokens, against plain loops over the trace; and what a run without their source says."""

from __future__ import annotations

import base64
from collections import OrderedDict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import synthetic
from numpy.testing import assert_allclose, assert_array_equal

import store
from app.exhibits.exhibit import Absent
from app.figures import token_colours
from app.frames import token_find, token_flips, token_measures, token_misses, tokens
from planner import importance

LAYER, OTHER = "3", "5"


def _value(run: store.Run, sequence: int, first: int, last: int, **choices: object) -> np.ndarray:
    routes = tokens.routes(run, sequence, first, last)
    found = token_measures.measured(run, routes, sequence=sequence, label=LAYER, **choices)  # type: ignore[arg-type]
    assert found.frame["position"].to_list() == list(range(first, last + 1))
    return found.frame["value"].to_numpy()


def _rows(run: store.Run, sequence: int, label: str) -> list[list[tuple[int, float]]]:
    """(expert, weight) of every token of a layer."""
    frame = tokens.token_routes(run, sequence).filter(pl.col("label") == label).sort("position", "rank")
    return [
        list(part.select("expert", "weight").iter_rows()) for _, part in frame.group_by("position", maintain_order=True)
    ]


def test_measures_from_gate_weights(run: store.Run) -> None:
    entropies, margins, weights = [], [], []
    for row in _rows(run, 4, LAYER)[10:30]:
        parts = [weight / sum(one for _, one in row) for _, weight in row]
        entropies.append(-sum(part * np.log(part) for part in parts if part) / np.log(len(parts)))
        margins.append(parts[0] - parts[1])
        weights.append(dict(row).get(6, 0.0))
    assert_allclose(_value(run, 4, 10, 29, name="entropy"), entropies, atol=1e-6)
    assert_allclose(_value(run, 4, 10, 29, name="margin"), margins, atol=1e-6)
    assert_allclose(_value(run, 4, 10, 29, name="weight", expert=6), weights, atol=1e-7)


def test_the_mean_over_layers(run: store.Run) -> None:
    each = []
    for label in ("1", "2", "3", "5"):
        rows = _rows(run, 2, label)[:8]
        each.append([(row[0][1] - row[1][1]) / (row[0][1] + row[1][1]) for row in rows])
    assert_allclose(_value(run, 2, 0, 7, name="margin", every=True), np.mean(each, axis=0), atol=1e-6)


def test_importance_is_weighed_by_gate_weights(run: store.Run) -> None:
    found = importance.score(run, "frequency")
    scores = {
        label: dict(found.filter(pl.col("layer") == int(label)).select("expert", "value").iter_rows())
        for label in ("1", "2", "3", "5")
    }

    def mean(label: str, scale: float) -> list[float]:
        rows = _rows(run, 4, label)[:20]
        return [sum(scores[label][e] / scale * w for e, w in row) / sum(w for _, w in row) for row in rows]

    assert_allclose(_value(run, 4, 0, 19, name="importance", score="frequency"), mean("3", 1.0), rtol=1e-5)
    all_layers = np.mean([mean(label, float(np.mean(list(scores[label].values())))) for label in scores], axis=0)
    assert_allclose(_value(run, 4, 0, 19, name="importance", score="frequency", every=True), all_layers, rtol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 6])
def test_misses_are_those_of_a_plain_cache(run: store.Run, slots: int) -> None:
    held: OrderedDict[int, None] = OrderedDict()
    missing: list[int] = []
    for sequence in range(5):
        missing = []
        for row in _rows(run, sequence, LAYER):
            wanted = [expert for expert, _ in row]
            missing.append(sum(expert not in held for expert in wanted))
            for expert in sorted(wanted, key=lambda one: one not in held):  # hits first, then loads
                held.pop(expert, None)
                held[expert] = None
            while len(held) > slots:
                held.popitem(last=False)
    frame = token_misses.misses(run, 4, LAYER, "lru", slots)
    if slots > 1:  # one slot holds one of two experts, whichever: only their number is told
        assert frame["missing"].to_list() == missing
    assert frame["missing"].sum() == pytest.approx(sum(missing), abs=0 if slots > 1 else synthetic.TOKENS)
    assert token_misses.misses(run, 4, LAYER, "lru", 16)["missing"].sum() <= 1
    assert token_misses.misses(run, 99, LAYER, "lru", 4).is_empty()


def test_sequences_of_an_expert(run: store.Run) -> None:
    found = token_find.by_expert(run, label=OTHER, expert=4)
    counts = {}
    for sequence in range(9):
        hits = [(at, dict(row)[4]) for at, row in enumerate(_rows(run, sequence, OTHER)) if 4 in dict(row)]
        if hits:
            counts[sequence] = (len(hits), max(weight for _, weight in hits))
    assert dict(found.select("sequence", "hits").iter_rows()) == {key: hits for key, (hits, _) in counts.items()}
    assert found["hits"].to_list() == sorted(found["hits"].to_list(), reverse=True)
    assert_allclose(found["weight"].to_list(), [counts[key][1] for key in found["sequence"]], atol=1e-6)
    for row in found.iter_rows(named=True):
        assert dict(_rows(run, row["sequence"], OTHER)[row["position"]])[4] == pytest.approx(row["weight"])
    only = token_find.by_expert(run, label=OTHER, expert=4, domain="code")
    assert set(only["sequence"]) == {number for number in counts if number % 3 == 0}


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """The synthetic run with other experts at tokens 5 and 50 of layer 3 of sequence 4."""
    frames = synthetic.tables()
    ids, weights = synthetic.selections(9)
    axis = synthetic.LAYERS.index(3)
    ids[axis, 4, 5] = [15, ids[axis, 4, 5, 1]]
    ids[axis, 4, 50] = ids[axis, 4, 50, ::-1]  # another order is the same set
    frames["route_chunk"] = synthetic._chunks(ids, weights, np.arange(9))
    writer = store.RunWriter.create(tmp_path_factory.mktemp("changed"), "changed", synthetic.info())
    writer.write_shard(frames)
    return store.open_run(writer.finish(seconds=1.0))


def test_flips_are_tokens_of_another_set(run: store.Run, changed: store.Run) -> None:
    found = token_flips.sequences(run, changed, label=LAYER)
    hits = found["sequences"].filter(pl.col("hits") > 0)
    assert hits.select("sequence", "other_sequence", "hits", "position").rows() == [(4, 4, 1, 5)]
    assert found["about"].rows() == [("token ids", 0)]
    here, there = tokens.routes(run, 4, 0, 19), tokens.routes(changed, 4, 0, 19)
    shares = token_flips.flips(run, changed, here, there, labels=[LAYER])
    assert_array_equal(np.flatnonzero(shares), [5])
    assert shares[5] == 0.5
    assert token_flips.flips(run, changed, here, there, labels=here.labels)[5] == 0.5 / 4


def _scored(directory: Path, *, top_k: int, scores: bool) -> store.Run:
    """A run of one layer of 6 experts and 700 tokens, with router scores or not."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(700, 6))
    order = np.argsort(-logits, axis=1)
    ids = order[:, :top_k]
    kept = np.take_along_axis(logits, order, axis=1)
    place = {"sequence": np.zeros(700, int), "position": np.arange(700)}
    frames = {
        "layer": {"layer": [0], "step": [0], "num_experts": [6], "top_k": [top_k]},
        "sequence": {"sequence": [0], "domain": ["a"], "tokens": [700]},
        "route_chunk": store.pack_trace(layer=0, ids=ids, weights=np.ones(ids.shape), num_experts=6, **place),
    }
    if scores:
        frames["score_chunk"] = store.pack_scores(
            layer=0, ids=order[:, :4], logits=kept[:, :4], log_partition=np.log(np.exp(logits).sum(axis=1)), **place
        )
    writer = store.RunWriter.create(directory, "scored", store.RunInfo(model="toy"))
    writer.write_shard(frames)
    return store.open_run(writer.finish(seconds=1.0))


def test_measures_from_router_scores(tmp_path: Path) -> None:
    with _scored(tmp_path, top_k=2, scores=True) as run:
        routes = tokens.routes(run, 0, 600, 650)
        logits = -np.sort(-np.random.default_rng(3).normal(size=(700, 6)), axis=1)[600:651]
        margin = token_measures.measured(run, routes, sequence=0, name="margin", label="0")
        assert margin.measure.unit == "logits"
        assert_allclose(margin.frame["value"].to_numpy(), logits[:, 1] - logits[:, 2], atol=2e-4)
        part = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        rest = part[:, 4:].sum(axis=1)  # the two that were not kept count as even
        nats = -(part[:, :4] * np.log(part[:, :4])).sum(axis=1) - rest * np.log(rest / 2)
        entropy = token_measures.measured(run, routes, sequence=0, name="entropy", label="0")
        assert_allclose(entropy.frame["value"].to_numpy(), nats / np.log(6), atol=2e-4)


def test_one_expert_per_token_has_no_margin_of_gate_weights(tmp_path: Path) -> None:
    with _scored(tmp_path, top_k=1, scores=False) as run:
        routes = tokens.routes(run, 0, 0, 9)
        for name in ("entropy", "margin"):
            with pytest.raises(Absent) as caught:
                token_measures.measured(run, routes, sequence=0, name=name, label="0")
            assert "--router-scores" in caught.value.remedy


def test_routes_for_a_browser_say_what_the_rows_say(run: store.Run) -> None:
    routes = tokens.routes(run, 4, 10, 20)
    packed = routes.packed
    shape = (len(synthetic.LAYERS), 11, synthetic.TOP_K)
    ids = np.frombuffer(base64.b64decode(str(packed["ids"])), np.uint8).reshape(shape)
    parts = np.frombuffer(base64.b64decode(str(packed["parts"])), np.uint8).reshape(shape)
    frame = tokens.token_routes(run, 4, 10, 20)
    for label, position, rank, expert, weight in frame.select(
        "label", "position", "rank", "expert", "weight"
    ).iter_rows():
        at = (routes.labels.index(label), position - 10, rank)
        total = frame.filter((pl.col("label") == label) & (pl.col("position") == position))["weight"].sum()
        assert ids[at] == expert
        assert parts[at] / 255 == pytest.approx(weight / total, abs=0.5 / 255 + 1e-6)
    assert routes.frame(LAYER).equals(frame.filter(pl.col("label") == LAYER))


def test_a_part_of_the_text_is_decoded_as_in_the_whole(run: store.Run) -> None:
    whole = tokens.sequence_tokens(run, 0)
    for first in range(9):
        assert tokens.sequence_tokens(run, 0, first, first + 5).equals(whole[first : first + 6])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_can_be_read(theme: str) -> None:
    colours = token_colours.ramp(theme) + token_colours.expert_colours(range(9), theme)
    assert len({background for background, _ in colours[-10:]}) == 10
    assert min(token_colours.contrast(ink, background) for background, ink in colours) >= 4.3
