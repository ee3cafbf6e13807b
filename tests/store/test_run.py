"""Runs: shards add up, a live run reads like a finished one, and nothing writes through a reader."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

import store
from moescope.errors import ShardError, StoreError
from store import Catalog, RunInfo, RunWriter
from store.schema import tables

KEY = {"step": 0, "kind": "routed", "phase": "prompt"}


def _load(layer: int, expert: int, domain: str, tokens: int, gate: float) -> dict[str, object]:
    return KEY | {"layer": layer, "expert": expert, "domain": domain, "tokens": tokens, "gate_sum": gate}


def _output(expert: int, tokens: int, largest: float, channel: int) -> dict[str, object]:
    return KEY | {
        "layer": 1,
        "expert": expert,
        "domain": "code",
        "tokens": tokens,
        "output_max": largest,
        "output_max_channel": channel,
    }


def _write_two_shards(directory: Path, name: str = "two") -> RunWriter:
    writer = RunWriter.create(directory, name, RunInfo(model="toy"))
    writer.write_shard(
        {
            "expert_load": pl.DataFrame([_load(1, 0, "code", 5, 0.5), _load(1, 1, "code", 7, 0.25)]),
            "expert_output": pl.DataFrame([_output(0, 5, 3.0, 11), _output(1, 7, 9.0, 12)]),
            "sequence": {"sequence": [0], "domain": ["code"], "tokens": [10]},
            "neuron_activation": {
                "layer": [1], "step": [0], "expert": [0], "kind": ["routed"], "domain": [""],
                "phase": ["prompt"], "tokens": [5], "square_sum": [[1.0, 2.0, 4.0]],
            },
        }
    )  # fmt: skip
    writer.write_shard(
        {
            "expert_load": pl.DataFrame([_load(1, 0, "code", 2, 0.5), _load(1, 0, "math", 1, 1.0)]),
            "expert_output": pl.DataFrame([_output(0, 2, 8.0, 13), _output(1, 1, 2.0, 14)]),
            "sequence": {"sequence": [0, 1], "domain": ["code", "math"], "tokens": [12, 4]},
            "neuron_activation": {
                "layer": [1], "step": [0], "expert": [0], "kind": ["routed"], "domain": [""],
                "phase": ["prompt"], "tokens": [2], "square_sum": [[0.5, 0.25, 8.0]],
            },
        }
    )  # fmt: skip
    return writer


def _check_merged(run: store.Run) -> None:
    load = run.table("expert_load").select("layer", "expert", "domain", "tokens", "gate_sum").rows()
    assert load == [(1, 0, "code", 7, 1.0), (1, 0, "math", 1, 1.0), (1, 1, "code", 7, 0.25)]
    output = run.table("expert_output").select("expert", "tokens", "output_max", "output_max_channel").rows()
    assert output == [(0, 7, 8.0, 13), (1, 8, 9.0, 12)]
    assert run.table("neuron_activation")["square_sum"].to_list() == [[1.5, 2.25, 12.0]]
    assert run.table("sequence").select("sequence", "domain", "tokens").rows() == [(0, "code", 12), (1, "math", 4)]
    assert (run.info.sequences, run.info.tokens, run.info.model) == (2, 16, "toy")
    assert run.domains == ["code", "math"]


def test_shards_merge_by_the_rules_of_the_schema(tmp_path: Path) -> None:
    writer = _write_two_shards(tmp_path)
    with store.open_run(writer.folder) as live:
        assert live.live and live.name == "two"
        _check_merged(live)
    path = writer.finish(seconds=2.5)
    assert path == tmp_path / "two.duckdb"
    assert not writer.folder.exists()
    with store.open_run(path) as run:
        assert not run.live and run.name == "two"
        _check_merged(run)
        assert run.info.seconds == 2.5 and run.info.complete


def test_ties_go_to_the_earliest_text_whatever_the_order_of_shards(tmp_path: Path) -> None:
    for name, order in (("forth", (3, 1, 2)), ("back", (2, 3, 1))):
        writer = RunWriter.create(tmp_path, name, RunInfo(model="toy"))
        for sequence in order:
            row = _output(0, 1, 7.0, channel=10 - sequence) | {"output_max_sequence": sequence}
            writer.write_shard({"expert_output": pl.DataFrame([row])})
        with store.open_run(writer.finish()) as run:
            found = run.query("select tokens, output_max_sequence, output_max_channel from expert_output")
            assert found.rows() == [(3, 1, 9)]


def test_every_table_is_there_even_when_nothing_filled_it(tmp_path: Path) -> None:
    run = store.open_run(_write_two_shards(tmp_path).finish())
    for name, table in tables().items():
        assert run.table(name).columns == [column.name for column in table.columns]
    assert run.query("select * from route").is_empty()
    assert run.metrics().columns == list(store.derived.COLUMNS)
    assert run.selections().ids.shape[0] == 0


def test_some_columns_of_a_table(live_and_finished: tuple[store.Run, store.Run]) -> None:
    for run in live_and_finished:
        whole = run.table("expert_load")
        some = run.table("expert_load", layer=1, columns=["gate_sum"])
        assert len(some) > 0 and some.equals(whole.filter(pl.col("layer") == 1).select(some.columns))
        assert some.columns == [*tables()["expert_load"].keys, "gate_sum"]
        assert run.table("run", columns=["model"]).columns == ["model"]
        with pytest.raises(StoreError, match="nothing"):
            run.table("expert_load", columns=["nothing"])


def test_half_a_shard_is_not_seen_and_not_kept(tmp_path: Path) -> None:
    writer = _write_two_shards(tmp_path)
    torn = writer.folder / ".shard-000002.tmp"
    torn.mkdir()
    (torn / "expert_load.parquet").write_bytes(b"PAR1 torn")
    _check_merged(store.open_run(writer.folder))
    resumed = RunWriter.resume(tmp_path, "two")
    assert not torn.exists()
    assert resumed.sequences_done == {0, 1}
    resumed.write_shard({"expert_load": pl.DataFrame([_load(1, 1, "math", 3, 0.5)])})
    load = store.open_run(resumed.finish()).table("expert_load")
    assert load["tokens"].sum() == 18


def test_a_damaged_shard_is_named_and_everything_stays(tmp_path: Path) -> None:
    writer = _write_two_shards(tmp_path)
    (writer.folder / "shard-000001" / "expert_load.parquet").write_bytes(b"not parquet")
    with pytest.raises(ShardError, match="shards cannot be merged"):
        writer.finish()
    assert (writer.folder / "shard-000000").is_dir()
    assert not list(tmp_path.glob("*.duckdb")) and not list(tmp_path.glob(".*.tmp"))


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("", "../up", "a b", ".hidden", "x.live", "a/b", "x.derived", "é"):
        with pytest.raises(StoreError, match="cannot name a run"):
            RunWriter.create(tmp_path, name, RunInfo(model="toy"))
    _write_two_shards(tmp_path)
    with pytest.raises(StoreError, match="--resume"):
        _write_two_shards(tmp_path)
    RunWriter.resume(tmp_path, "two").finish()
    with pytest.raises(StoreError, match="already has a run 'two'"):
        _write_two_shards(tmp_path)
    with pytest.raises(StoreError, match="finished already"):
        RunWriter.resume(tmp_path, "two")
    with pytest.raises(StoreError, match="does not exist"):
        RunWriter.resume(tmp_path, "three")


def test_unknown_tables_and_columns_are_refused(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path, "x", RunInfo(model="toy"))
    with pytest.raises(ShardError, match="no table 'loads'"):
        writer.write_shard({"loads": {"a": [1]}})
    with pytest.raises(ShardError, match="no column 'weight'"):
        writer.write_shard({"sequence": {"sequence": [1], "weight": [2]}})
    with pytest.raises(ShardError, match="recorded nothing"):
        writer.finish()


@pytest.fixture(scope="module")
def live_and_finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[store.Run, store.Run]]:
    """The same run while it is collected and when it is finished, opened; nothing may change them."""
    live = _write_two_shards(tmp_path_factory.mktemp("live"))
    finished = _write_two_shards(tmp_path_factory.mktemp("finished"))
    with store.open_run(live.folder) as first, store.open_run(finished.finish()) as second:
        yield first, second


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('/etc/hostname')",
        "select * from '/etc/hostname'",
        "copy (select 1) to '/tmp/moescope-must-not-exist.csv'",
        "attach '/tmp/moescope-must-not-exist.db' as other",
        "set enable_external_access = true",
        "create table mine as select 1",
        "drop view route",
        "delete from data.expert_load",
        "select 1; select 2",
        "pragma database_list",
        "install httpfs",
        "",
    ],
)
def test_a_reader_only_reads(live_and_finished: tuple[store.Run, store.Run], sql: str) -> None:
    live, run = live_and_finished
    for one in (live, run):
        with pytest.raises(StoreError):
            one.query(sql)
    _check_merged(run)
    assert not Path("/tmp/moescope-must-not-exist.csv").exists()


def test_parameters_are_bound(tmp_path: Path) -> None:
    run = store.open_run(_write_two_shards(tmp_path).finish())
    hostile = "code' or '1'='1"
    assert run.query("select * from expert_load where domain = ?", [hostile]).is_empty()
    assert len(run.query("select * from expert_load where domain = $domain", {"domain": "code"})) == 2


def test_threads_get_their_own_answers(tmp_path: Path) -> None:
    run = store.open_run(_write_two_shards(tmp_path).finish())
    wrong = []

    def ask(number: int) -> None:
        for value in range(number * 100, number * 100 + 50):
            if run.query("select ?::integer as echo from expert_load limit 1", [value]).item() != value:
                wrong.append(value)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_file_opens_in_plain_duckdb(tmp_path: Path) -> None:
    path = _write_two_shards(tmp_path).finish()
    script = (
        f"import duckdb; print(duckdb.connect({str(path)!r}, read_only=True).sql('select * from route').fetchall())"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
    renamed = path.with_name("other-name.duckdb")
    path.rename(renamed)
    with duckdb.connect() as connection:
        connection.execute(f"attach '{renamed}' as anything (read_only)")
        assert connection.sql("select count(*) from anything.route").fetchall() == [(0,)]


def test_files_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run at"):
        store.open_run(tmp_path / "missing.duckdb")
    (tmp_path / "text.duckdb").write_text("hello")
    with pytest.raises(StoreError, match="cannot be read as a run"):
        store.open_run(tmp_path / "text.duckdb")
    with duckdb.connect(str(tmp_path / "foreign.duckdb")) as connection:
        connection.execute("create table t as select 1")
    with pytest.raises(StoreError, match="not a run of moescope"):
        store.open_run(tmp_path / "foreign.duckdb")
    with duckdb.connect(str(tmp_path / "old.duckdb")) as connection:
        connection.execute("create table run as select 0 as schema_version")
    with pytest.raises(StoreError, match="schema 0"):
        store.open_run(tmp_path / "old.duckdb")
    (tmp_path / "bare.live").mkdir()
    with pytest.raises(ShardError, match="run.json cannot be read"):
        store.open_run(tmp_path / "bare.live")


def test_catalog(tmp_path: Path) -> None:
    assert Catalog(tmp_path / "nowhere").entries() == []
    path = _write_two_shards(tmp_path, "alpha").finish()
    _write_two_shards(tmp_path, "beta")
    store.write_metrics(path, pl.DataFrame({"metric": ["srp"], "value": [0.5]}))
    catalog = Catalog(tmp_path)
    assert [(entry.name, entry.live) for entry in catalog.entries()] == [("alpha", False), ("beta", True)]
    assert catalog.resolve("alpha") == path and catalog.resolve(path) == path
    with pytest.raises(StoreError, match="did you mean alpha"):
        catalog.resolve("alpah")
    with pytest.raises(StoreError, match="already has a run 'beta'"):
        catalog.rename("alpha", "beta")
    renamed = catalog.rename("alpha", "gamma")
    run = store.open_run(renamed)
    assert run.name == "gamma" and run.metrics("srp")["value"].to_list() == [0.5]
    catalog.delete("gamma")
    catalog.delete("beta")
    assert list(tmp_path.iterdir()) == []


def test_metric_results_replace_their_own_kind(tmp_path: Path) -> None:
    path = _write_two_shards(tmp_path).finish()
    before = store.version_of(path)
    first = pl.DataFrame(
        {"metric": ["srp", "srp", "load_cv"], "parameters": ["a", "b", "{}"], "value": [1.0, 2.0, 3.0]}
    )
    store.write_metrics(path, first)
    assert store.version_of(path) != before
    store.write_metrics(path, pl.DataFrame({"metric": ["srp"], "parameters": ["a"], "value": [9.0]}))
    rows = store.open_run(path).metrics().sort("metric", "parameters").select("metric", "parameters", "value").rows()
    assert rows == [("load_cv", "{}", 3.0), ("srp", "a", 9.0), ("srp", "b", 2.0)]
    with pytest.raises(StoreError, match="no column 'level'"):
        store.write_metrics(path, pl.DataFrame({"metric": ["srp"], "level": [1]}))


def test_vectors_stand_beside_scalars_and_replace_their_own_kind(tmp_path: Path) -> None:
    path = _write_two_shards(tmp_path).finish()
    row = {"metric": "transition", "parameters": "{}", "layer": 1, "step": 0, "expert": 0, "to_layer": 2, "to_step": 0}
    scalar = pl.DataFrame({"metric": ["srp"], "parameters": ["{}"], "value": [0.5]})
    store.write_metrics(
        path, scalar, pl.DataFrame([row | {"values": [1.0, 2.0]}, row | {"expert": 1, "values": [3.0]}])
    )
    store.write_metrics(path, pl.DataFrame(), pl.DataFrame([row | {"values": [7.0]}]))
    with store.open_run(path) as run:
        assert run.metric_vectors("transition").select("expert", "values").rows() == [(0, [7.0])]
        assert run.metric_vectors("lift").is_empty()
        assert run.metrics("srp")["value"].to_list() == [0.5]
    store.write_metrics(path, scalar)
    with store.open_run(path) as run:
        assert len(run.metric_vectors("transition")) == 1
    with pytest.raises(StoreError, match="metric_vector has no column 'value'"):
        store.write_metrics(path, scalar, scalar)


def test_results_of_before_vectors_were_kept_read_as_none(tmp_path: Path) -> None:
    path = _write_two_shards(tmp_path).finish()
    results = store.write_metrics(path, pl.DataFrame({"metric": ["srp"], "parameters": ["{}"], "value": [0.5]}))
    with duckdb.connect(str(results)) as connection:
        connection.execute("drop table metric_vector")
    with store.open_run(path) as run:
        assert run.metric_vectors("transition").is_empty()
    union = store.attach([path])
    assert union.query("select count(*) from metric_vector").item() == 0
    union.close()


def test_union_of_runs(tmp_path: Path) -> None:
    paths = [_write_two_shards(tmp_path, name).finish() for name in ("alpha", "beta")]
    store.write_metrics(paths[1], pl.DataFrame({"metric": ["srp"], "value": [0.5]}))
    union = store.attach(paths)
    rows = union.query("select run, sum(tokens)::integer from expert_load group by run order by run").rows()
    assert rows == [("alpha", 15), ("beta", 15)]
    assert union.query("select run, value from metric_value").rows() == [("beta", 0.5)]
    with pytest.raises(StoreError):
        union.query("select * from read_csv('/etc/hostname')")
    with pytest.raises(StoreError, match="two runs are named"):
        store.attach([paths[0], paths[0]])


def test_merging_equals_numpy_on_random_shards(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    writer = RunWriter.create(tmp_path, "random", RunInfo(model="toy"))
    tokens = np.zeros((3, 4), np.int64)
    squares = np.zeros((3, 6))
    largest = np.full((3, 4), -np.inf)
    channel = np.zeros((3, 4), np.int64)
    for _ in range(5):
        count, peak, at = generator.integers(0, 50, (3, 4)), generator.random((3, 4)), generator.integers(0, 99, (3, 4))
        vector = generator.random((3, 6))
        tokens += count
        squares += vector
        channel = np.where(peak > largest, at, channel)
        largest = np.maximum(peak, largest)
        grid = {
            "layer": np.repeat(np.arange(3), 4), "expert": np.tile(np.arange(4), 3), "step": [0] * 12,
            "kind": ["routed"] * 12, "domain": ["a"] * 12, "phase": ["prompt"] * 12, "tokens": count.ravel(),
        }  # fmt: skip
        writer.write_shard(
            {
                "expert_output": grid | {"output_max": peak.ravel(), "output_max_channel": at.ravel()},
                "neuron_activation": {
                    "layer": np.arange(3), "step": [0] * 3, "expert": [0] * 3, "kind": ["routed"] * 3,
                    "domain": [""] * 3, "phase": ["prompt"] * 3, "tokens": count.sum(1), "square_sum": vector.tolist(),
                },
            }
        )  # fmt: skip
    run = store.open_run(writer.finish())
    output = run.table("expert_output")
    np.testing.assert_array_equal(output["tokens"].to_numpy().reshape(3, 4), tokens)
    np.testing.assert_array_equal(output["output_max"].to_numpy().reshape(3, 4), largest)
    np.testing.assert_array_equal(output["output_max_channel"].to_numpy().reshape(3, 4), channel)
    np.testing.assert_allclose(np.array(run.table("neuron_activation")["square_sum"].to_list()), squares, rtol=1e-6)


def test_a_collection_of_the_same_name_and_length_has_another_version(tmp_path: Path) -> None:
    folder = _write_two_shards(tmp_path).folder
    before = store.version_of(folder)
    assert store.version_of(folder) == before
    folder.rename(tmp_path / "kept")  # so that its inodes stay taken
    assert store.version_of(_write_two_shards(tmp_path).folder) != before
