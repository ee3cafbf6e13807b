"""An imported trace reads like a collected one; nothing is left of an import that failed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import profiler
import store
from moescope.errors import ImportFileError, InputError, StoreError
from profiler.importers import job, registry
from profiler.importers.recording import CountBlock, ImportOptions, Recording, SequenceLabel, TraceBlock
from tests.profiler.capture import tiny
from tests.profiler.importers.traces import arrays, bring_in, left_behind, selections_of, write_npz

LAYERS = [store.LayerInfo(layer=layer, num_experts=4, top_k=2) for layer in (1, 3)]


def _block(ids: object, *, sequence: object = None, position: object = None, weights: object = None) -> TraceBlock:
    array = np.asarray(ids)
    tokens = array.shape[1]
    return TraceBlock(
        array,
        None if weights is None else np.asarray(weights, np.float32),
        np.zeros(tokens, np.int64) if sequence is None else np.asarray(sequence),
        np.arange(tokens) if position is None else np.asarray(position),
        np.ones(tokens, bool),
    )


def _import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *blocks: object, **facts: object) -> store.Run:
    """Import what a reader of a made-up format yields; a block that is an exception is raised."""

    def given() -> Iterator[object]:
        for block in blocks:
            if isinstance(block, BaseException):
                raise block
            yield block

    class Double:
        name, path = "double", "FILE"

        @staticmethod
        def read(path: Path, options: ImportOptions) -> Recording:
            return Recording(layers=LAYERS, blocks=given(), **facts)  # type: ignore[arg-type]

    monkeypatch.setattr(job, "format_named", lambda name: Double)
    file = tmp_path / "file"
    file.write_bytes(b"x")
    target = job.import_run("double", file, directory=tmp_path / "runs", name="mine", metrics=False)
    return store.open_run(target)


def test_tables_equal_those_of_the_collection_of_the_same_trace(tmp_path: Path) -> None:
    """A watched model's trace, written as .npz and imported; 8-bit weights set the tolerance."""
    model = tiny.build("qwen3_moe")
    with profiler.watch(model, store=tmp_path, name="watched", level="routing") as session:
        for seed in range(3):
            session.label(domains=["a", "b", "a"])
            model(**tiny.batch(seed=seed))
    watched = store.open_run(tmp_path / "watched.duckdb")
    trace = watched.selections()
    kept = np.arange(trace.ids.shape[2]) < trace.lengths[:, None]
    experts, weights = (array.transpose(1, 2, 0, 3)[kept] for array in (trace.ids, trace.weights))
    file = tmp_path / "trace.npz"
    np.savez(
        file, experts=experts, weights=weights, offsets=np.cumsum([0, *trace.lengths]), domain=np.array(trace.domains),
        layers=np.array([layer for layer, _ in trace.layers]), num_experts=np.int64(watched.layers[0].num_experts),
    )  # fmt: skip
    imported = bring_in("npz", file, tmp_path, name="imported", phase="prompt")
    keys = ["layer", "step", "expert", "domain", "phase"]
    for table, exact, close in (
        ("expert_load", ["tokens", "first_choices", "first_positions"], ["gate_sum", "gate_share_sum"]),
        ("expert_pair", ["selections"], []),
        ("expert_rank", ["tokens"], ["gate_sum"]),
        ("router_load", ["tokens", "selections"], ["weight_entropy_sum"]),
        ("expert_part", ["tokens"], ["gate_sum"]),
    ):
        names = [key for key in keys if key in watched.table(table).columns]
        ours, theirs = (run.table(table).sort(names) for run in (imported, watched))
        assert ours.select(names).equals(theirs.select(names)), table
        assert ours.select(exact).equals(theirs.select(exact)), table
        for column in close:
            left, right = (frame[column].explode().to_numpy() for frame in (ours, theirs))
            np.testing.assert_allclose(left, right, atol=0.05, rtol=0.01, err_msg=f"{table}.{column}")
    np.testing.assert_array_equal(imported.selections().ids, trace.ids)
    assert imported.domains == watched.domains == ["a", "b"]


def test_statistics_against_plain_counting(tmp_path: Path) -> None:
    trace = arrays()
    run = bring_in("npz", write_npz(tmp_path / "t.npz", trace), tmp_path / "runs")
    expected: Counter[tuple[int, int]] = Counter()
    pairs: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for token in trace.experts.tolist():
        for layer, chosen in enumerate(token):
            for expert in chosen:
                expected[layer, expert] += 1
                pairs[layer, expert].update(chosen)
    assert selections_of(run) == expected
    for layer, expert, row in run.table("expert_pair").select("layer", "expert", "selections").iter_rows():
        assert row == [pairs[layer, expert][other] for other in range(6)]
    gates = run.table("expert_load").group_by("layer").agg(pl.col("gate_sum").sum()).sort("layer")["gate_sum"]
    np.testing.assert_allclose(gates, trace.weights.sum((0, 2)), rtol=1e-5)
    assert run.badge.status == "unchecked" and "another engine" in run.badge.reason
    assert set(run.omissions) == {"logits", "outputs", "text"}
    assert (run.info.origin, run.info.tokens, run.info.sequences, run.info.complete) == ("import npz", 744, 4, True)
    assert run.table("sequence")["tokens"].to_list() == [3, 700, 1, 40]


def test_blocks_may_cut_sequences_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.stack([np.stack([np.arange(9) % 4, (np.arange(9) + 1) % 4], -1)] * 2)
    run = _import(
        tmp_path, monkeypatch,
        _block(ids[:, :5], sequence=[0, 0, 1, 1, 1], position=[0, 1, 0, 1, 2]),
        _block(ids[:, 5:], sequence=[1, 0, 2, 2], position=[3, 2, 0, 1]),
        labels={0: SequenceLabel("code", "a.py"), 2: SequenceLabel("math")},
        omissions={"weights": "none"},
    )  # fmt: skip
    assert run.table("sequence").select("domain", "tokens").rows() == [("code", 3), ("imported", 4), ("math", 2)]
    trace = run.selections()
    assert trace.ids[0, 0, :3, 0].tolist() == [0, 1, 2]
    assert trace.ids[1, 1, :4, 0].tolist() == [2, 3, 0, 1]
    assert run.table("expert_load")["gate_sum"].null_count() == len(run.table("expert_load"))


def test_experts_are_put_into_descending_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = _block([[[0, 1], [-1, 2]]] * 2, weights=[[[0.25, 0.75], [0.0, 1.0]]] * 2)
    run = _import(tmp_path, monkeypatch, block)
    assert run.selections().ids[0, 0].tolist() == [[1, 0], [2, -1]]
    assert run.table("expert_load").filter(pl.col("layer") == 1)["first_choices"].to_list() == [0, 1, 1, 0]
    assert "order of experts" in run.table("check")["name"].to_list()


def test_counts_make_a_run_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.arange(16).reshape(2, 2, 4)
    run = _import(tmp_path, monkeypatch, CountBlock(counts, np.array([0, 1])), omissions={"trace": "counts only"})
    assert not run.has_trace
    assert selections_of(run) == {
        (layer, expert): int(counts[:, axis, expert].sum()) for axis, layer in enumerate((1, 3)) for expert in range(4)
    }
    assert run.table("load_span").filter(pl.col("layer") == 3)["tokens"].to_list() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert run.info.tokens == int(counts[:, 1].sum()) // 2
    assert run.domains == ["imported"]
    assert run.omissions["trace"] == "counts only"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (_block([[[0, 4]]] * 2), "expert 4 is out of range; 4 experts are numbered 0 to 3"),
        (_block([[[0, -2]]] * 2), "expert -2 is out of range"),
        (_block([[[1, 1]]] * 2), "layer 1, token 0 of a block has expert 1 twice"),
        (_block([[[0, 1]]]), r"selections have shape \(1, 1, 2\), not \(2 layers"),
        (_block([[[0, 1]]] * 2, weights=[[[0.5, np.nan]]] * 2), "negative, infinite or NaN"),
        (_block([[[0, 1]]] * 2, weights=[[[0.5, -0.5]]] * 2), "negative, infinite or NaN"),
        (_block([[[0, 1]]] * 2, position=[1]), "sequence 0 stands at token 1 where token 0 is due"),
        (_block([[[0, 1]] * 2] * 2, position=[0, 2]), "skips tokens"),
        (_block([[[0, 1]]] * 2, sequence=[0, 0]), "sequence does not have one entry for each of 1 tokens"),
        (CountBlock(np.full((1, 2, 4), -1), np.zeros(1, np.int64)), "a count of selections is -1"),
        (CountBlock(np.zeros((1, 2, 5), int), np.zeros(1, np.int64)), "counts have shape"),
        (CountBlock(np.full((1, 2, 4), np.nan), np.zeros(1, np.int64)), "fractions or NaN"),
    ],
)
def test_what_is_wrong_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: object, message: str
) -> None:
    good = _block([[[0, 1]]] * 2, sequence=[9])
    with pytest.raises(ImportFileError, match=message):
        _import(tmp_path, monkeypatch, good, block)
    assert left_behind(tmp_path / "runs") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone"), MemoryError()])
def test_an_import_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    with pytest.raises((KeyboardInterrupt, ImportFileError)):
        _import(tmp_path, monkeypatch, _block([[[0, 1]]] * 2), error)
    assert left_behind(tmp_path / "runs") == []


def test_names_and_formats_that_cannot_be(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "t.npz", arrays())
    bring_in("npz", file, tmp_path / "runs")
    with pytest.raises(StoreError, match="already has a run 'mine'"):
        bring_in("npz", file, tmp_path / "runs")
    with pytest.raises(InputError, match="no import format 'npy'; there are npz"):
        bring_in("npy", file, tmp_path / "runs", name="other")
    with pytest.raises(ImportFileError, match="there is no such file"):
        bring_in("npz", tmp_path / "none.npz", tmp_path / "runs", name="other")


def test_every_format_of_the_registry_has_a_reader() -> None:
    for one in registry.FORMATS:
        assert callable(one.read)
    assert len({one.name for one in registry.FORMATS}) == len(registry.FORMATS)
