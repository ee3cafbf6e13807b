"""Headline metrics: what is stored is what the formulas give, for every run that can be thought of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import store
from moescope.errors import StoreError
from profiler import headline
from profiler.headline import subject as parts
from profiler.headline.subject import Subject
from profiler.metrics import local_consistency
from profiler.metrics.registry import METRICS
from store import RunInfo, RunWriter

LAYERS, EXPERTS, TOP_K = (1, 3), 8, 2


def _write(directory: Path, lengths: list[int], *, outputs: bool = True, name: str = "toy") -> Path:
    """A run with sticky routing: each sequence has favourites, so that its order matters."""
    generator = np.random.default_rng(3)
    writer = RunWriter.create(directory, name, RunInfo(model="toy", num_layers=4))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    domains = ["code" if number % 2 else "prose" for number in range(len(lengths))]
    frames: dict[str, list[pl.DataFrame]] = {"route_chunk": [], "expert_load": []}
    for layer in LAYERS:
        score = generator.normal(size=(len(lengths), EXPERTS))[sequence] * 2 + generator.normal(
            size=(len(sequence), EXPERTS)
        )
        ids = np.argsort(-score, axis=1)[:, :TOP_K]
        weights = np.sort(generator.random((len(ids), TOP_K)), axis=1)[:, ::-1]
        frames["route_chunk"].append(
            store.pack_trace(
                layer=layer, sequence=sequence, position=position, ids=ids, weights=weights, num_experts=EXPERTS
            )
        )
        for domain in sorted(set(domains)):
            inside = np.array([domains[number] == domain for number in sequence])
            counts = np.bincount(ids[inside].ravel(), minlength=EXPERTS)
            frames["expert_load"].append(_per_expert(layer, domain, {"tokens": counts}))
    shard: dict[str, object] = {table: pl.concat(parts) for table, parts in frames.items()}
    shard["layer"] = {"layer": LAYERS, "step": [0, 0], "num_experts": [EXPERTS] * 2, "top_k": [TOP_K] * 2}
    shard["sequence"] = {"sequence": range(len(lengths)), "domain": domains, "tokens": lengths}
    if outputs:
        largest = np.ones((2, EXPERTS))
        largest[1, 5] = 900.0
        shard["expert_output"] = pl.concat(
            [
                _per_expert(layer, "code", {"output_max": largest[axis], "first_routed_output_max": largest[axis]})
                for axis, layer in enumerate(LAYERS)
            ]
        )
        shard["residual"] = {
            "layer": [0, 1, 2, 3], "domain": ["code"] * 4, "phase": ["prompt"] * 4,
            "absolute_max": [1.0, 2.0, 3.0, 5000.0], "median_there": [1.0, 1.0, 1.0, 1.0],
        }  # fmt: skip
    writer.write_shard(shard)  # type: ignore[arg-type]
    return writer.finish()


def _per_expert(layer: int, domain: str, values: dict[str, np.ndarray]) -> pl.DataFrame:
    key = {"layer": layer, "step": 0, "kind": "routed", "domain": domain, "phase": "prompt"}
    return pl.DataFrame({"expert": range(EXPERTS), **values}).with_columns(
        **{name: pl.lit(value) for name, value in key.items()}
    )


def test_stored_values_are_those_of_the_formulas(tmp_path: Path) -> None:
    path = _write(tmp_path, [70, 80, 90, 30])
    headline.compute_and_store(path)
    run = store.open_run(path)
    ids = run.selections().ids
    observed = run.metrics("srp").filter(
        (pl.col("control") == "observed") & pl.col("layer").is_null() & pl.col("domain").is_null()
    )
    assert observed["at"].to_list() == [4.0, 16.0, 64.0]  # no two sequences have 256 tokens
    for at, value, low, high in observed.select("at", "value", "low", "high").iter_rows():
        direct = local_consistency.srp(selections=ids, num_experts=EXPERTS, segment_length=int(at), scope="model")
        assert value == pytest.approx(float(direct.value), abs=1e-12)
        assert low < value < high
    own = run.metrics("hit_rate_lru").filter(pl.col("layer") == 3).sort("at")["value"].to_numpy()
    curve = local_consistency.hit_rate_curve(selections=ids, num_experts=EXPERTS, policy="lru")
    np.testing.assert_allclose(own, curve[1], atol=1e-12)
    shared = run.metrics("hit_rate_sch").filter(
        (pl.col("parameters") == json.dumps({"segment_length": 16, "shared": True})) & (pl.col("control") == "observed")
    )
    assert len(shared) == EXPERTS * len(LAYERS)
    assert shared.sort("at")["value"][-1] == 1.0


def test_controls_destroy_what_they_say(tmp_path: Path) -> None:
    path = _write(tmp_path, [200] * 12)
    headline.compute_and_store(path)
    rows = (
        store.open_run(path)
        .metrics("srp")
        .filter(pl.col("layer").is_null() & pl.col("domain").is_null() & (pl.col("at") == 16))
    )
    value = dict(rows.select("control", "value").iter_rows())
    # Order inside a sequence was random, favourites were per sequence: the first control keeps them, the others do not.
    assert value["shuffled_in_sequence"] == pytest.approx(value["observed"], abs=0.02)
    assert value["shuffled"] < value["observed"] - 0.1
    chance = local_consistency.srp_uniform(num_experts=EXPERTS, top_k=TOP_K, segment_length=16)
    assert value["uniform"] == pytest.approx(float(chance.value), abs=0.01)
    assert value["lower_bound"] == pytest.approx(2 * 0.25 / 1.25, abs=1e-6)


def test_super_experts_need_massive_activations_behind_them(tmp_path: Path) -> None:
    path = _write(tmp_path, [40, 40])
    headline.compute_and_store(path)
    rows = store.open_run(path).metrics("super_experts")
    found = rows.filter(pl.col("expert").is_not_null())
    paper = found.filter(pl.col("parameters").str.contains("paper"))
    assert set(paper.select("layer", "expert", "value").iter_rows()) == {(3, 5, 900.0)}
    # The code's rule looks at the first three of four decoder layers only, where all values are equal.
    assert found.filter(pl.col("parameters").str.contains("code")).is_empty()
    assert rows.filter(pl.col("expert").is_null())["value"].min() == pytest.approx(1.0)


def test_every_name_is_in_the_registry_and_rows_are_unique(tmp_path: Path) -> None:
    path = _write(tmp_path, [70, 80, 90])
    headline.compute_and_store(path)
    frame = store.open_run(path).metrics()
    assert set(frame["metric"]) <= {metric.name for metric in METRICS}
    key = ["metric", "parameters", "control", "domain", "layer", "step", "expert", "at"]
    assert not frame.select(key).is_duplicated().any()
    again = store.open_run(headline.compute_and_store(path).with_name("toy.duckdb")).metrics()
    assert again.sort(key).equals(frame.sort(key))


@pytest.mark.parametrize("lengths", [[1], [3, 2], [300]])
def test_short_and_single_sequences(tmp_path: Path, lengths: list[int]) -> None:
    path = _write(tmp_path, lengths, outputs=False)
    headline.compute_and_store(path)
    frame = store.open_run(path).metrics()
    assert len(frame.filter(pl.col("metric") == "gini")) > 0
    assert frame.filter(pl.col("metric") == "super_experts").is_empty()
    assert np.isfinite(frame.filter(pl.col("metric") == "hit_rate_lru")["value"].to_numpy()).all()


def test_a_replay_that_would_take_hours_is_sampled_from_all_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(store.open_run(_write(tmp_path, [50] * 40, outputs=False)))
    assert subject.sample(subject.replay_tokens).is_all
    monkeypatch.setattr(parts, "REPLAY_COST", 50 * 40 * len(LAYERS) * TOP_K * len(LAYERS) * EXPERTS / 4)
    monkeypatch.setattr(parts, "REPLAY_TOKENS", 0)
    sampled = subject.sample(subject.replay_tokens).block
    assert len(sampled.lengths) == 10
    assert set(sampled.domains) == {"code", "prose"}


def test_blocks_give_what_the_whole_trace_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in many small blocks, every observed figure is the same; only the seeds of the controls differ."""
    run = store.open_run(_write(tmp_path, [70, 80, 1, 90, 30, 65], outputs=False))
    whole, _ = headline.compute(run)
    monkeypatch.setattr(parts, "BLOCK_TOKENS", 100)
    assert len(Subject(run).blocks) > 3
    cut, _ = headline.compute(run)
    keys = ["metric", "parameters", "domain", "layer", "step", "expert", "at"]
    observed = [frame.filter(pl.col("control") == "observed").sort(keys) for frame in (whole, cut)]
    assert observed[0].select(keys).equals(observed[1].select(keys))
    for column in ("value", "low", "high"):
        left, right = (frame[column].to_numpy() for frame in observed)
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)


def test_samples_and_groups_keep_domains_and_controls_keep_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.open_run(_write(tmp_path, [10 + number % 7 for number in range(60)], outputs=False))
    monkeypatch.setattr(parts, "BLOCK_TOKENS", 150)
    monkeypatch.setattr(parts, "MAX_GROUPS", 10)
    subject = Subject(run)
    assert subject.groups.count == 10
    domains = np.concatenate([block.domains for block in subject.blocks])
    assert (subject.groups.domain[subject.groups.group] == domains).all()
    assert np.bincount(subject.groups.group).tolist() == [6] * 10
    sample = subject.sample(200)
    assert not sample.is_all and 150 < sample.block.tokens <= 200
    trace = run.selections(sequences=sample.block.sequences.tolist())
    for axis in range(2):
        kept = np.arange(trace.ids.shape[2]) < trace.lengths[:, None]
        np.testing.assert_array_equal(sample.ids(axis), trace.ids[axis][kept])
    shuffled = [sample.ids(axis, control="shuffled_in_sequence") for axis in range(2)]
    for low, high in zip(sample.block.offsets[:-1], sample.block.offsets[1:], strict=True):
        both = [np.concatenate([ids[axis][low:high] for axis in range(2)], axis=1) for ids in
                ([sample.ids(0), sample.ids(1)], shuffled)]  # fmt: skip
        assert sorted(map(tuple, both[0].tolist())) == sorted(map(tuple, both[1].tolist())), "a token keeps its layers"
    assert (shuffled[0] != sample.ids(0)).any()
    uniform = sample.ids(0, control="uniform")
    assert (uniform >= 0).all() and (np.sort(uniform)[:, 1:] != np.sort(uniform)[:, :-1]).all()


def test_a_live_run_is_refused(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path, "live", RunInfo(model="toy"))
    with pytest.raises(StoreError, match="still being collected"):
        headline.compute_and_store(writer.folder)
