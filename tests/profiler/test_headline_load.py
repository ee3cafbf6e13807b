"""Load of whole runs: values against counting, intervals against drawing sequences by hand and against the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

import store
from profiler.headline import load as headline
from profiler.headline import subject as parts
from profiler.headline.load import BALANCE_FIELDS, LOAD
from profiler.headline.subject import SEED, Rows, Subject
from profiler.metrics import load
from profiler.metrics._intervals import Resamples, interval, resample_weights
from store import RunInfo, RunWriter

EXPERTS, TOP_K, LAYER = 6, 2, 3


def write(directory: Path, lengths: list[int], *, trace: bool = True) -> tuple[store.Run, NDArray[np.int64]]:
    """A run of one layer whose sequences prefer experts of their own; and its counts (sequences, experts)."""
    generator = np.random.default_rng(1)
    score = np.linspace(1.0, -1.0, EXPERTS) + generator.normal(size=(len(lengths), EXPERTS))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.argsort(-(score[sequence] + generator.gumbel(size=(len(sequence), EXPERTS))), axis=1)[:, :TOP_K]
    counts = np.stack([np.bincount(ids[sequence == one].ravel(), minlength=EXPERTS) for one in range(len(lengths))])
    domains = np.array(["code" if number % 3 else "prose" for number in range(len(lengths))])
    info = RunInfo(model="toy", num_layers=5, tokens=len(sequence), sequences=len(lengths))
    writer = RunWriter.create(directory, "toy", info)
    keys: dict[str, Any] = {"layer": LAYER, "step": 0, "kind": "routed", "phase": "prompt"}
    shard: dict[str, Any] = {
        "layer": {"layer": [LAYER], "step": [0], "num_experts": [EXPERTS], "top_k": [TOP_K]},
        "sequence": {"sequence": range(len(lengths)), "domain": domains, "tokens": lengths},
        "expert_load": pl.concat(
            pl.DataFrame({"expert": range(EXPERTS), "tokens": counts[domains == domain].sum(0)}).with_columns(
                domain=pl.lit(domain), **{name: pl.lit(value) for name, value in keys.items()}
            )
            for domain in ("code", "prose")
        ),
    }
    if trace:
        shard["route_chunk"] = store.pack_trace(
            layer=LAYER, sequence=sequence, position=np.concatenate([np.arange(length) for length in lengths]),
            ids=ids, weights=np.full(ids.shape, 0.5), num_experts=EXPERTS,
        )  # fmt: skip
    writer.write_shard(shard)
    return store.open_run(writer.finish()), counts


def found(rows: Rows, metric: str, domain: str | None = None) -> dict[str, Any]:
    """The one row of a metric."""
    (row,) = [row for row in rows if row["metric"] == metric and row["domain"] == domain]
    return row


def test_values_are_those_of_the_counts(tmp_path: Path) -> None:
    run, counts = write(tmp_path, [40, 50, 60, 30, 20, 10])
    rows = LOAD(Subject(run))
    for domain, chosen in ((None, slice(None)), ("prose", slice(0, None, 3))):
        even = load.balance(load=counts[chosen].sum(0)[None])
        for metric, field in BALANCE_FIELDS.items():
            assert found(rows, metric, domain)["value"] == pytest.approx(float(getattr(even, field)[0]))
    assert found(rows, "gini")["tokens"] == 210 and found(rows, "gini", "prose")["tokens"] == 70
    assert (found(rows, "gini")["sequences"], found(rows, "gini", "prose")["sequences"]) == (6, 2)


@pytest.mark.parametrize("domain", [None, "code"])
def test_intervals_are_those_of_sequences_drawn_by_hand(tmp_path: Path, domain: str | None) -> None:
    run, every = write(tmp_path, [40, 50, 60, 30, 20, 10])
    row = found(LOAD(Subject(run)), "gini", domain)
    counts = every if domain is None else every[[1, 2, 4, 5]]
    weights = resample_weights(num_sequences=len(counts), num_resamples=headline.NUM_RESAMPLES, seed=SEED)
    drawn = []
    for weight in weights.astype(int):
        text = np.repeat(np.arange(len(counts)), weight)  # the sequences of one drawn text, one after the other
        drawn.append(float(load.balance(load=counts[text].sum(0)[None]).gini[0]))
    low, high = interval(
        estimate=np.array(row["value"]), resampled=np.array(drawn), confidence=headline.CONFIDENCE, rule="basic"
    )
    assert (row["low"], row["high"]) == pytest.approx((max(float(low), 0.0), float(high)))


def test_blocks_do_not_change_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = write(tmp_path, [40, 50, 60, 30, 20, 10])
    whole = LOAD(Subject(run))
    monkeypatch.setattr(parts, "BLOCK_TOKENS", 70)
    assert len(Subject(run).blocks) > 2
    for one, other in zip(whole, LOAD(Subject(run)), strict=True):
        assert one == pytest.approx(other, nan_ok=True)


def test_thousands_of_sequences_are_drawn_in_groups_with_the_same_spread() -> None:
    values = np.random.default_rng(2).gamma(1.0, size=(4000, 3))
    grouped = Resamples.of(4000, num_resamples=4000, seed=0, max_groups=200)
    assert grouped.groups == 200 and set(np.bincount(grouped.group)) == {20}
    sums = np.stack([values[grouped.group == group].sum(0) for group in range(200)])
    # A spread from 200 groups has a relative error of 1 / sqrt(400), one of 4,000 draws less than half of that.
    np.testing.assert_allclose(grouped.sums(sums).std(0), np.sqrt(4000) * values.std(0), rtol=0.2)
    alone = Resamples.of(5, num_resamples=10, seed=0)
    assert alone.group.tolist() == [0, 1, 2, 3, 4] and (alone.weights.sum(1) == 5).all()


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Texts of 60 sequences, each with a favourite: 95 % intervals of the load's cv hold what an endless text has."""
    generator = np.random.default_rng(3)
    rates = np.array([0.3, 0.25, 0.2, 0.12, 0.08, 0.05])
    truth = float(load.balance(load=rates[None]).cv[0])
    held = 0
    for _ in range(200):
        shares = generator.dirichlet(rates * 20, size=60)
        counts = np.stack([generator.multinomial(50, share) for share in shares])
        resamples = Resamples.of(60, num_resamples=300, seed=0)
        layer = store.LayerInfo(LAYER, num_experts=EXPERTS, top_k=TOP_K)
        estimate = headline._measures(counts.sum(0, keepdims=True), layer, 1500.0)
        drawn = headline._measures(resamples.sums(counts), layer, 1500.0)
        low, high = headline._ends(estimate, drawn, EXPERTS)["cv"]
        held += low <= truth <= high
    assert 0.88 <= held / 200 <= 0.99  # 0.95, with a standard error of 0.015, less what the bootstrap lacks


def test_counts_alone_have_values_without_intervals(tmp_path: Path) -> None:
    run, _ = write(tmp_path, [40, 50], trace=False)
    row = found(LOAD(Subject(run)), "max_violation")
    assert row["value"] > 0 and "low" not in row
    single, _ = write(tmp_path / "single", [40])
    assert "low" not in found(LOAD(Subject(single)), "cv")
