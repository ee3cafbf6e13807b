"""Coverage of whole runs: rows against scipy on the parts themselves, and texts of experts whose rates are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from scipy import stats

import store
from profiler.headline.coverage import NUM_DRAWS, coverage_rows, layer_reach, part_sums
from profiler.headline.subject import SEED, Rows, Subject
from profiler.metrics import coverage
from profiler.metrics.agreement import cut_overlap, overlap, spearman
from store import NUM_PARTS, RunInfo, RunWriter, part_of_sequence

EXPERTS, TOP_K, LENGTH = 12, 2, 30
LAYERS = (1, 4)

Ids = NDArray[np.int64]


def write(
    directory: Path,
    *,
    sequences: int = 48,
    parts: bool = True,
    trace: bool = True,
    spans: bool = False,
    top_k: int = TOP_K,
) -> tuple[store.Run, Ids]:
    """A run whose experts are ever rarer, the last one unused, and its ids (layers, sequences, tokens, k)."""
    generator = np.random.default_rng(0)
    wanted = np.linspace(1.5, -1.5, EXPERTS) + generator.gumbel(size=(len(LAYERS), sequences, LENGTH, EXPERTS))
    wanted[..., -1] = -99.0
    ids = np.argsort(-wanted, axis=-1)[..., :TOP_K]
    counts = np.stack([[np.bincount(one.ravel(), minlength=EXPERTS) for one in layer] for layer in ids])
    info = RunInfo(model="toy", num_layers=5, tokens=sequences * LENGTH, sequences=sequences)
    writer = RunWriter.create(directory, "toy", info)
    shard: dict[str, Any] = {
        "layer": {"layer": LAYERS, "step": [0, 0], "num_experts": [EXPERTS] * 2, "top_k": [top_k] * 2},
        "sequence": {"sequence": range(sequences), "domain": ["d"] * sequences, "tokens": [LENGTH] * sequences},
        "expert_load": pl.concat(table(axis, {"tokens": counts[axis].sum(0)}, load=True) for axis in range(2)),
    }
    if trace:
        shard["route_chunk"] = pl.concat(
            store.pack_trace(
                layer=layer, sequence=np.repeat(np.arange(sequences), LENGTH),
                position=np.tile(np.arange(LENGTH), sequences), ids=ids[axis].reshape(-1, TOP_K),
                weights=np.full((sequences * LENGTH, TOP_K), 0.5), num_experts=EXPERTS,
            )
            for axis, layer in enumerate(LAYERS)
        )  # fmt: skip
    if parts:
        norms = np.linspace(2.0, 1.0, EXPERTS)[:, None]
        summed = [by_part(counts[axis]) for axis in range(2)]
        sums = [{"tokens": one, "gate_sum": 0.5 * one, "norm_sum": norms * one} for one in summed]
        shard["expert_part"] = pl.concat(
            table(axis, {name: values.tolist() for name, values in sums[axis].items()}) for axis in range(2)
        )
    if spans:
        shard["load_span"] = pl.concat(
            pl.DataFrame({"span": range(sequences), "tokens": counts[axis].tolist()}).with_columns(
                layer=pl.lit(layer), step=pl.lit(0)
            )
            for axis, layer in enumerate(LAYERS)
        )
    writer.write_shard(shard)
    return store.open_run(writer.finish()), ids


def table(axis: int, values: dict[str, Any], *, load: bool = False) -> pl.DataFrame:
    keys: dict[str, Any] = {"layer": LAYERS[axis], "step": 0, "kind": "routed"}
    keys |= {"domain": "d", "phase": "prompt"} if load else {}
    frame = pl.DataFrame({"expert": range(EXPERTS), **values})
    return frame.with_columns(**{name: pl.lit(value) for name, value in keys.items()})


def by_part(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(experts, parts) sums of counts (sequences, experts), sequence by sequence."""
    result = np.zeros((counts.shape[1], NUM_PARTS), np.int64)
    for number, row in enumerate(counts):
        result[:, part_of_sequence(number)] += row
    return result


def found(rows: Rows, metric: str, *, layer: int | None = None, at: float | None = None, **text: Any) -> dict[str, Any]:
    """The one row of a metric with these parameters."""
    matching = [
        row for row in rows
        if row["metric"] == metric and row.get("layer") == layer and row.get("at") == at
        and row.get("control", "observed") == "observed" and json.loads(row["parameters"]) == text
    ]  # fmt: skip
    assert len(matching) == 1
    return matching[0]


def test_halves_are_those_of_scipy(tmp_path: Path) -> None:
    run, _ = write(tmp_path)
    rows = coverage_rows(Subject(run))
    parts = part_sums(Subject(run))
    pairs = coverage.draw_pairs(num_parts=NUM_PARTS, size=8, other=8, num_draws=NUM_DRAWS, seed=SEED)
    each: dict[str, list[list[float]]] = {"spearman": [], "kendall": []}
    for first, second in zip(*pairs, strict=True):
        halves = [(sums["tokens"][:, first].sum(1), sums["tokens"][:, second].sum(1)) for sums in parts.values()]
        each["spearman"].append([stats.spearmanr(*half).statistic for half in halves])
        each["kendall"].append([stats.kendalltau(*half).statistic for half in halves])
    for measure, values in each.items():
        text = {"score": "frequency", "measure": measure}
        pooled = found(rows, "split_half_agreement", **text)
        assert pooled["value"] == pytest.approx(np.mean(values))
        assert (pooled["low"], pooled["high"]) == pytest.approx(np.quantile(np.mean(values, 1), [0.025, 0.975]))
        own = found(rows, "split_half_agreement", layer=4, **text)
        assert own["value"] == pytest.approx(np.mean(values, 0)[1])
    half = np.mean(each["spearman"])
    whole = found(rows, "split_half_agreement", score="frequency", measure="spearman", length="whole")
    assert whole["value"] == pytest.approx(2 * half / (1 + half))
    needed = found(rows, "tokens_needed", score="frequency", goal="ranking")
    assert needed["value"] == pytest.approx(48 * LENGTH * 0.95 * (1 - whole["value"]) / (whole["value"] * 0.05))


def test_every_score_that_all_layers_hold(tmp_path: Path) -> None:
    run, _ = write(tmp_path)
    rows = coverage_rows(Subject(run))
    scores = {json.loads(row["parameters"])["score"] for row in rows if row["metric"] == "tokens_needed"}
    assert scores == {"frequency", "gate_mass", "mean_gate", "ean", "man"}
    # The gate is the same for all, the norm the same for all tokens of an expert: nothing to learn from more text.
    assert found(rows, "split_half_agreement", score="man", measure="spearman")["value"] == pytest.approx(1.0, abs=1e-9)
    share = found(rows, "prefix_agreement", at=0.5, score="frequency", against="equal", measure="spearman")
    assert share["value"] == found(rows, "split_half_agreement", score="frequency", measure="spearman")["value"]
    chance = [row for row in rows if row.get("control") == "chance" and row["at"] == 0.25]
    assert chance[0]["value"] == pytest.approx(0.25, abs=0.03)


def test_errors_of_every_expert(tmp_path: Path) -> None:
    run, ids = write(tmp_path)
    row = found(coverage_rows(Subject(run)), "relative_error", layer=1, score="frequency", by="parts")
    counts = np.stack([np.bincount(one.ravel(), minlength=EXPERTS) for one in ids[0]])
    parts = by_part(counts).astype(float)
    expected = np.sqrt(NUM_PARTS) * parts.std(axis=1, ddof=1)[:-1] / parts.sum(1)[:-1]
    np.testing.assert_allclose(row["values"][:-1], expected)
    assert np.isnan(row["values"][-1])  # never used


def test_starved_by_hand(tmp_path: Path) -> None:
    run, ids = write(tmp_path)
    rows = coverage_rows(Subject(run))
    counts = np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in ids])
    by_hand = (counts < 0.1 * TOP_K * ids.shape[1] * LENGTH / EXPERTS).sum(1)
    per_layer = [row for row in rows if row["metric"] == "starved_experts" and "layer" in row]
    assert [row["value"] for row in per_layer] == by_hand.tolist() and (by_hand > 0).all()
    assert (
        next(row for row in rows if row["metric"] == "starved_experts" and "layer" not in row)["value"] == by_hand.sum()
    )
    assert [reach.balanced for _, _, reach in layer_reach(run)] == [240.0, 240.0]
    unsaid, _ = write(tmp_path / "unsaid", parts=False, trace=False, top_k=0)
    assert [reach.threshold for _, _, reach in layer_reach(unsaid)] == [24.0, 24.0]  # the same without knowing k


def test_the_trace_gives_what_the_table_gives(tmp_path: Path) -> None:
    both, _ = write(tmp_path / "a")
    traced, _ = write(tmp_path / "b", parts=False)
    for layer, sums in part_sums(Subject(traced)).items():
        np.testing.assert_array_equal(sums["tokens"], part_sums(Subject(both))[layer]["tokens"])
    text = {"score": "frequency", "measure": "spearman"}
    one, other = (found(coverage_rows(Subject(run)), "split_half_agreement", **text) for run in (both, traced))
    assert one == other


def test_passes_are_parts_in_stretches_of_time(tmp_path: Path) -> None:
    run, ids = write(tmp_path, parts=False, trace=False, spans=True)
    sums = part_sums(Subject(run))[1, 0]["tokens"]
    by_hand = [np.bincount(ids[0, start : start + 3].ravel(), minlength=EXPERTS) for start in range(0, 48, 3)]
    np.testing.assert_array_equal(sums, np.stack(by_hand, axis=1))


def test_requests_that_last_do_not_make_passes_agree(tmp_path: Path) -> None:
    """Eight requests at a time, 40 passes each: dealt out one by one, passes agree more than other traffic would."""
    generator = np.random.default_rng(0)
    liking = np.log(generator.gamma(5.0, size=32))

    def traffic() -> NDArray[np.int64]:
        rates = np.exp(liking + generator.normal(size=(24, 8, 32))).mean(axis=1)
        return generator.poisson(3 * np.repeat(rates, 40, axis=0))

    expected, dealt, truth = [], [], []
    for number in range(8):
        counts = traffic()
        writer = RunWriter.create(tmp_path, f"passes{number}", RunInfo(model="toy", tokens=int(counts.sum())))
        spans = pl.DataFrame({"span": range(len(counts)), "tokens": counts.tolist()})
        writer.write_shard(
            {
                "layer": {"layer": [0], "step": [0], "num_experts": [32], "top_k": [0]},
                "load_span": spans.with_columns(layer=pl.lit(0), step=pl.lit(0)),
            }
        )
        rows = coverage_rows(Subject(store.open_run(writer.finish())))
        expected.append(
            found(rows, "split_half_agreement", score="frequency", measure="spearman", length="whole")["value"]
        )
        dealt.append(_whole(by_part(counts)))
        truth.append(float(spearman(first=traffic().sum(0), second=traffic().sum(0))))
    assert np.mean(expected) == pytest.approx(np.mean(truth), abs=0.04)
    assert np.mean(dealt) > 0.99 > np.mean(truth) + 0.02


def _whole(sums: NDArray[np.int64]) -> float:
    pairs = coverage.draw_pairs(num_parts=NUM_PARTS, size=8, other=8, num_draws=NUM_DRAWS, seed=SEED)
    agreed = coverage.part_agreement(parts={"tokens": sums}, name="frequency", first=pairs[0], second=pairs[1])
    return float(coverage.lengthened(agreement=agreed.spearman.mean(), factor=2))


def test_counts_alone_and_single_sequences_say_who_starves(tmp_path: Path) -> None:
    counted, _ = write(tmp_path / "a", parts=False, trace=False)
    assert {row["metric"] for row in coverage_rows(Subject(counted))} == {"starved_experts"}
    single, _ = write(tmp_path / "b", sequences=1)
    assert {row["metric"] for row in coverage_rows(Subject(single))} == {"starved_experts", "relative_error"}
    three, _ = write(tmp_path / "c", sequences=3)
    rows = coverage_rows(Subject(three))
    half = found(rows, "split_half_agreement", score="frequency", measure="spearman")["value"]
    whole = found(rows, "split_half_agreement", score="frequency", measure="spearman", length="whole")["value"]
    assert whole == pytest.approx(3 * half / (1 + 2 * half))  # one sequence against another: the whole is three


@pytest.mark.parametrize("topics", [None, 60.0])
def test_as_many_tokens_as_are_asked_for_are_enough(topics: float | None) -> None:
    """Sequences of known rates, alike or each with a topic of its own: texts of the length asked for meet the target.

    Within 0.02 for the ranking, 0.04 for a cut of 8 of 32 experts; with fewer than the 24 layers a cut is less sure.
    """
    generator = np.random.default_rng(4)
    rates = generator.gamma(6.0, size=(24, 32))
    rates /= rates.sum(1, keepdims=True)

    def text(layer: int, sequences: int) -> NDArray[np.int64]:
        shares = np.tile(rates[layer], (sequences, 1))
        if topics is not None:
            shares = generator.gamma(shares * topics)
        return generator.multinomial(100, shares / shares.sum(1, keepdims=True))

    parts = {(layer, 0): {"tokens": by_part(text(layer, 48))} for layer in range(24)}
    rows = _needed(parts, tokens=4_800)
    for at, target, tolerance in ((None, 0.95, 0.02), (0.25, float(cut_overlap(correlation=0.95, share=0.25)), 0.04)):
        length = round(rows[at] / 100)
        reached = []
        for _ in range(3):
            texts = [(text(layer, length).sum(0), text(layer, length).sum(0)) for layer in range(24)]
            reached += [
                float(spearman(first=one, second=other) if at is None else overlap(first=one, second=other, share=at))
                for one, other in texts
            ]
        assert np.mean(reached) == pytest.approx(target, abs=tolerance), (at, length)


def _needed(parts: dict[tuple[int, int], dict[str, Any]], *, tokens: int) -> dict[float | None, float]:
    """Tokens needed by share of experts cut; None = for the ranking."""
    from profiler.headline.coverage import _half_rows

    rows = _half_rows(parts, "frequency", {"tokens": tokens})
    return {row["at"]: row["value"] for row in rows if row["metric"] == "tokens_needed" and "layer" not in row}
