"""Flow as headline metrics: what was planted is found, controls lack it, and every row says what it rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

import store
from profiler.headline.flow import PAIRS, PARTS, lookahead_rows, lookahead_sums, parts_of, transition_rows
from profiler.headline.subject import Groups, Subject
from profiler.metrics import co_activation
from store import LayerInfo, RunInfo, RunWriter, pack_trace

EXPERTS, TOP_K, LENGTH = 12, 2, 60
LAYERS = (1, 2, 4, 5)
"""Layer 2 follows from layer 1 alone, layer 4 from nothing, layer 5 holds the pairs 0-1, 2-3, ... alone."""


def selections(sequences: int, seed: int = 0) -> dict[int, NDArray[np.int16]]:
    """By layer (sequences, tokens, k)."""
    rng = np.random.default_rng(seed)
    shape = (sequences, LENGTH, EXPERTS)
    free = {layer: np.argsort(rng.random(shape), axis=-1)[..., :TOP_K].astype(np.int16) for layer in LAYERS}
    twins = 2 * (free[5][..., :1] // 2)
    return {**free, 2: (free[1] + 3) % EXPERTS, 5: np.concatenate([twins, twins + 1], axis=-1)}


def write(
    directory: Path,
    *,
    sequences: int = 24,
    trace: bool = True,
    pairs: bool = False,
    extra: dict[str, Any] | None = None,
) -> Path:
    ids = selections(sequences)
    writer = RunWriter.create(directory, "flow", RunInfo(model="m", num_layers=6))
    layers = [vars(LayerInfo(layer, 0, "m", "E", "R", EXPERTS, TOP_K, 0, 4)) for layer in LAYERS]
    shard: dict[str, pl.DataFrame] = {"layer": pl.DataFrame(layers), **(extra or {})}
    if trace:
        shard["route_chunk"] = pl.concat(
            pack_trace(
                layer=layer, sequence=np.repeat(np.arange(sequences), LENGTH),
                position=np.tile(np.arange(LENGTH), sequences), ids=ids[layer].reshape(-1, TOP_K),
                weights=np.full((sequences * LENGTH, TOP_K), 0.5, np.float32), num_experts=EXPERTS,
            )
            for layer in LAYERS
        )  # fmt: skip
        text = {"domain": ["a", "b", "b"] * (sequences // 3 + 1), "source": [""] * (sequences + 3)}
        numbers = {"sequence": list(range(sequences)), "tokens": [LENGTH] * sequences}
        prompt = {"prompt_tokens": [LENGTH] * sequences}
        shard["sequence"] = pl.DataFrame({**numbers, **{name: text[name][:sequences] for name in text}, **prompt})
    if pairs:
        shard["expert_pair"] = pl.concat(
            pl.DataFrame({"expert": range(EXPERTS), "selections": counted(ids[layer]).tolist()}).with_columns(
                layer=pl.lit(layer), step=pl.lit(0), domain=pl.lit(""), phase=pl.lit("prompt")
            )
            for layer in LAYERS
        )
    writer.write_shard(shard)
    return writer.finish()


def counted(ids: NDArray[np.int16], other: NDArray[np.int16] | None = None) -> NDArray[np.int64]:
    """(experts, experts) tokens that use both, by indicators."""
    hot = [
        np.eye(EXPERTS, dtype=np.int64)[part.reshape(-1, TOP_K)].sum(axis=1)
        for part in (ids, ids if other is None else other)
    ]
    product: NDArray[np.int64] = hot[0].T @ hot[1]
    return product


def rows_of(path: Path) -> list[dict[str, Any]]:
    with store.open_run(path) as run:
        subject = Subject(run)
        rows = [row for part in (PAIRS, transition_rows, lookahead_rows) for row in part(subject)]
    return [{"control": "observed", "layer": None, "parameters": None, "at": None, **row} for row in rows]


def pick(rows: list[dict[str, Any]], metric: str, *, distance: int = 0, **place: Any) -> dict[str, Any]:
    wanted = {"control": "observed", **place}
    if distance:
        wanted["parameters"] = json.dumps({"distance": distance})
    (found,) = [row for row in rows if row["metric"] == metric and all(row[key] == wanted[key] for key in wanted)]
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rows_of(write(tmp_path_factory.mktemp("flow")))


def test_a_layer_that_follows_is_foreseen_and_its_controls_are_not(rows: list[dict[str, Any]]) -> None:
    chance = TOP_K / EXPERTS
    certain = pick(rows, "transition_recall", layer=2, distance=1, at=0.0)
    assert (certain["value"], certain["low"], certain["high"]) == (1.0, 1.0, 1.0)
    assert (certain["tokens"], certain["sequences"]) == (24 * LENGTH, 24)
    for control in ("shuffled", "shuffled_in_sequence"):
        lost = pick(rows, "transition_recall", layer=2, distance=1, at=0.0, control=control)
        assert lost["value"] == pytest.approx(chance, abs=0.03)
    free = pick(rows, "transition_recall", layer=4, distance=1, at=0.0)
    assert free["low"] < free["value"] < free["high"]
    assert free["value"] == pytest.approx(chance, abs=0.03)  # held out: nothing is learnt by heart
    popular = pick(rows, "popularity_recall", layer=2, at=3.0)
    assert popular["value"] == pytest.approx((TOP_K + 3) / EXPERTS, abs=0.03)
    assert {row["at"] for row in rows if row["metric"] == "popularity_recall"} == set(map(float, range(9)))


def test_all_layers_together_are_their_choices_together(rows: list[dict[str, Any]]) -> None:
    for metric, distance in (("transition_recall", 1), ("popularity_recall", 0)):
        whole = pick(rows, metric, layer=None, distance=distance, at=0.0)
        single = [pick(rows, metric, layer=layer, distance=distance, at=0.0)["value"] for layer in LAYERS[1:]]
        assert whole["value"] == pytest.approx(np.mean(single))
        assert whole["low"] < whole["value"] < whole["high"]


def test_distances_reach_back_to_the_layers_before(rows: list[dict[str, Any]]) -> None:
    found = {(row["layer"], json.loads(row["parameters"])["distance"]) for row in rows
             if row["metric"] == "transition_information"}  # fmt: skip
    assert found == {(2, 1), (4, 1), (4, 2), (5, 1), (5, 2), (5, 3)}


def test_information_is_that_of_the_counts(rows: list[dict[str, Any]]) -> None:
    ids = selections(24)

    def bits(kept: NDArray[np.bool_]) -> float:
        joint = counted(ids[1][kept], ids[2][kept]).astype(float)
        joint /= joint.sum()
        outer = np.outer(joint.sum(axis=1), joint.sum(axis=0))
        return float(
            sum(joint[place] * np.log2(joint[place] / outer[place]) for place in zip(*joint.nonzero(), strict=True))
        )

    found = pick(rows, "transition_information", layer=2, distance=1)
    assert found["value"] == pytest.approx(bits(np.ones(24, bool)))
    part = parts_of(Groups.of(np.array(["a", "b", "b"] * 8)))
    left = np.array([bits(part != one) for one in range(PARTS)])
    error = np.sqrt((PARTS - 1) / PARTS * ((left - left.mean()) ** 2).sum())
    assert (found["high"] - found["low"]) / 2 == pytest.approx(2.1314495 * error)  # Student's t, 15 degrees of freedom
    noise = pick(rows, "transition_information", layer=2, distance=1, control="shuffled")["value"]
    assert noise < 0.1 * found["value"]
    assert pick(rows, "transition_information", layer=4, distance=1)["value"] == pytest.approx(noise, abs=noise)


def test_pairs_stand_out_where_they_were_planted(rows: list[dict[str, Any]]) -> None:
    twins, free = (pick(rows, "pair_excess", layer=layer) for layer in (5, 4))
    noise = {layer: pick(rows, "pair_excess", layer=layer, control="popularity") for layer in (5, 4)}
    # of the 11 others, one takes all pairs and popularity would have given it an eleventh
    assert twins["value"] == pytest.approx(10 / 11, abs=0.01)
    assert twins["value"] > 5 * noise[5]["high"]
    assert noise[4]["low"] * 0.7 < free["value"] < noise[4]["high"] * 1.3
    assert twins["at"] == twins["tokens"] == 24 * LENGTH  # one pair a token
    assert twins["value"] == pytest.approx(co_activation.pair_excess(pairs=counted(selections(24)[5])))


def test_recorded_pairs_say_the_same_without_an_interval(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    recorded = rows_of(write(tmp_path, trace=False, pairs=True))
    assert {row["metric"] for row in recorded} == {"pair_excess"}
    for layer in LAYERS:
        row = pick(recorded, "pair_excess", layer=layer)
        assert row["value"] == pytest.approx(pick(rows, "pair_excess", layer=layer)["value"])
        assert "low" not in row and "tokens" not in row


def test_what_a_run_lacks_gives_no_rows(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "counts", trace=False)) == []
    one = rows_of(write(tmp_path / "one", sequences=1))  # nothing else to fit on, nothing to draw anew
    assert {row["metric"] for row in one} == {"pair_excess", "transition_information", "conditional_entropy"}
    assert all("low" not in row for row in one if row["control"] == "observed")
    two = rows_of(write(tmp_path / "two", sequences=2))
    assert pick(two, "transition_recall", layer=2, distance=1, at=0.0)["value"] > 0.9


def test_every_domain_is_spread_over_all_parts() -> None:
    domains = np.array(["a"] * 40 + ["b"] * 5 + ["c"] * 19)
    part = parts_of(Groups.of(domains))
    assert np.ptp(np.bincount(part, minlength=PARTS)) <= 1
    for domain in "abc":
        assert np.ptp(np.bincount(part[domains == domain] % 2, minlength=2)) <= 1


def lookahead_table() -> pl.DataFrame:
    """Two domains and a first position: layer 2 from the layer before."""
    place = {"layer": 2, "step": 0, "distance": 1, "input": "router", "phase": "prompt"}
    rows = [
        {"domain": "a", "first": False, "tokens": 3, "selections": 6, "hits": [4, *[5] * 8], "exact": [1, *[2] * 8],
         "first_hits": 2, "cosine_sum": 2.4},
        {"domain": "b", "first": False, "tokens": 1, "selections": 2, "hits": [2] * 9, "exact": [1] * 9,
         "first_hits": 1, "cosine_sum": 0.8},
        {"domain": "a", "first": True, "tokens": 9, "selections": 18, "hits": [0] * 9, "exact": [0] * 9,
         "first_hits": 0, "cosine_sum": 0.0},
    ]  # fmt: skip
    return pl.DataFrame([{**place, **row} for row in rows])


def test_lookahead_adds_domains_up_and_leaves_first_positions_out(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path, trace=False, extra={"lookahead": lookahead_table()}))
    values = [pick(rows, "lookahead_recall", layer=2, at=float(at))["value"] for at in (0, 1, 8)]
    assert values == pytest.approx([6 / 8, 7 / 8, 7 / 8])
    assert pick(rows, "lookahead_exact", layer=2, at=0.0)["value"] == pytest.approx(2 / 4)
    assert pick(rows, "lookahead_first_choice", layer=2)["value"] == pytest.approx(3 / 4)
    cosine = pick(rows, "lookahead_cosine", layer=2)
    assert cosine["value"] == pytest.approx(3.2 / 4)
    assert (cosine["tokens"], cosine["parameters"]) == (4, json.dumps({"distance": 1, "input": "router"}))
    assert lookahead_sums(lookahead_table().clear()).is_empty()


def test_recall_is_held_out_both_ways(rows: list[dict[str, Any]]) -> None:
    before, after = (part.reshape(-1, TOP_K) for part in (selections(24)[2], selections(24)[4]))
    part = parts_of(Groups.of(np.array(["a", "b", "b"] * 8)))
    fold = np.repeat(part % 2, LENGTH)
    hits = popular = 0
    for half in (0, 1):
        load = np.bincount(after[fold != half].ravel(), minlength=EXPERTS)
        joint = counted(before[fold != half], after[fold != half])
        table = (joint + load / load.sum()) / (joint.sum(axis=1, keepdims=True) + 1)
        favourites = set(np.argsort(-load, kind="stable")[:TOP_K].tolist())
        for one, other in zip(before[fold == half], after[fold == half], strict=True):
            best = np.argsort(-(table[one[0]] + table[one[1]]), kind="stable")[:TOP_K]
            hits += len(set(best.tolist()) & set(other.tolist()))
            popular += len(favourites & set(other.tolist()))
    found = pick(rows, "transition_recall", layer=4, distance=1, at=0.0)["value"]
    assert found == pytest.approx(hits / after.size)
    assert pick(rows, "popularity_recall", layer=4, at=0.0)["value"] == pytest.approx(popular / after.size)
