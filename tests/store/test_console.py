"""The console: what it answers, what it refuses, and that limits hold; and browsing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

import store
from moescope.errors import StoreError
from store.answering import answer

sys.path.insert(0, str(Path(__file__).parents[1] / "app"))
import synthetic


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("console")
    one, other = synthetic.finished(folder, "one"), synthetic.finished(folder, "other", metrics=False)
    return {"one": one, "other": other, "live": synthetic.live(folder).folder}


@pytest.fixture(scope="module")
def run(paths: dict[str, Path]) -> Iterator[store.Run]:
    with store.open_run(paths["one"]) as opened:
        yield opened


def ask(run: store.Run | store.Union, sql: str, *, rows: int = 100, seconds: float = 60.0) -> store.Answer:
    """In this process, where only limits of time and rows hold: quick."""
    return answer(run._connection, sql, rows=rows, seconds=seconds)


def test_one_run_is_asked_in_a_process_of_its_own(paths: dict[str, Path], run: store.Run) -> None:
    found = store.console(paths["one"]).ask("select layer, sum(tokens) as tokens from expert_load group by layer")
    expected = run.table("expert_load").group_by("layer").agg(pl.col("tokens").sum()).sort("layer")
    assert found.frame.sort("layer").equals(expected) and not found.cut
    assert found.frame.schema["tokens"] == pl.Int64  # DuckDB sums into 128 bits


def test_several_runs_are_asked_as_one(paths: dict[str, Path]) -> None:
    console = store.console([paths["one"], paths["other"]])
    frame = console.ask("select run, count(*) as rows from route group by run order by run").frame
    assert frame["run"].to_list() == ["one", "other"]
    for name, rows in frame.iter_rows():
        with store.open_run(paths[name]) as single:
            assert single.query("select count(*) as rows from route")["rows"].to_list() == [rows]


def test_examples_answer_for_every_kind_of_run(paths: dict[str, Path], run: store.Run) -> None:
    both = store.attach([paths["one"], paths["other"]])
    with store.open_run(paths["live"]) as live:
        for example in store.EXAMPLES:
            for opened in (run, live, both):
                assert len(ask(opened, example.sql, rows=10_000).frame.columns) >= 3, example.title
    both.close()


def test_examples_fill_where_the_run_has_all(run: store.Run) -> None:
    empty = {one.title for one in store.EXAMPLES if ask(run, one.sql).frame.is_empty()}
    assert len(store.EXAMPLES) >= 10
    assert empty <= {"Experts chosen together", "Checks that did not pass", "Largest outputs"}


def test_rows_are_cut_and_said_to_be(run: store.Run) -> None:
    assert ask(run, "from range(5)", rows=5).cut is False
    found = ask(run, "select range from range(100) order by range desc", rows=5)
    assert found.cut and found.frame["range"].to_list() == [99, 98, 97, 96, 95]


@pytest.mark.parametrize(
    "sql",
    ["describe expert_load", "show tables", "summarize layer", "explain select 1", "explain analyze from layer",
     "with a as (select 1 as b) select b from a", "from layer", "values (1)", "select 1;", "-- words\nselect 1"],
)  # fmt: skip
def test_reading_statements_are_answered(run: store.Run, sql: str) -> None:
    assert len(ask(run, sql).frame)


@pytest.mark.parametrize(
    "sql",
    ["", "select 1; select 2", "create table a as select 1", "insert into layer values (1)", "delete from layer",
     "update layer set top_k = 1", "drop view layer", "attach 'a.duckdb'", "detach data", "copy layer to 'a.csv'",
     "copy layer from 'a.csv'", "export database 'a'", "import database 'a'", "pragma database_list", "set threads = 9",
     "reset threads", "install httpfs", "load httpfs", "use data", "call range(3)", "checkpoint", "vacuum",
     "prepare a as select 1", "begin",
     "explain analyze create table a as select 1", "explain analyze delete from layer",
     "with a as (delete from data.layer returning *) select * from a", "create macro a() as 1",
     "select * from read_csv('/etc/hosts')", "select * from '/etc/hosts.csv'", "select * from glob('/*')",
     "select * from read_text('/etc/hosts')", "select * from read_blob('/etc/hosts')", "select getenv('HOME')",
     "select * from read_parquet('https://example.org/a.parquet')", "select * from duckdb_secrets()",
     "select * from query('copy layer to ''a.csv''')"],
)  # fmt: skip
def test_all_else_is_refused(run: store.Run, sql: str) -> None:
    with pytest.raises(StoreError) as refused:
        ask(run, sql)
    assert "\n" not in str(refused.value)


def test_a_live_run_shows_its_shards_and_no_other_file(paths: dict[str, Path]) -> None:
    with store.open_run(paths["live"]) as live:
        assert len(ask(live, "from expert_load").frame)
        with pytest.raises(StoreError, match="Permission"):
            ask(live, "select * from read_text('/etc/hosts')")


@pytest.mark.parametrize(
    ("sql", "place"),
    [("select layer form expert_load", "(line 1, column 19)"), ("select\n  layer,\nfrom where", "(line 3, column 6)"),
     ("selct 1", "(line 1, column 1)")],
)  # fmt: skip
def test_errors_are_one_line_with_the_place(run: store.Run, sql: str, place: str) -> None:
    with pytest.raises(StoreError) as refused:
        ask(run, sql)
    message = str(refused.value)
    assert "\n" not in message and message.endswith(place)
    with pytest.raises(StoreError, match=r'Did you mean "?expert_load'):
        ask(run, "from expert_lod")


@pytest.mark.parametrize(
    "sql",
    ["with recursive a(n) as (select 1 union all select n + 1 from a) select max(n) from a",
     "select count(*) from range(1000000) a, range(1000000) b, range(1000000) c where a.range + b.range = c.range + 7",
     "select max(range) from range(1000000000000)"],
)  # fmt: skip
def test_what_would_never_end_is_interrupted(run: store.Run, sql: str) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match="stopped after"):
        ask(run, sql, seconds=0.3)
    assert time.monotonic() - began < 5


@pytest.mark.skipif(sys.platform != "linux", reason="memory and signals of Linux")
@pytest.mark.parametrize(
    ("sql", "message"),
    [("select repeat('x', 4000000000)", "stopped after|memory"),
     ("select list(range) from range(1000000000)", "memory"),
     ("select repeat('x', 10000) from range(9999)", "more than the 64 MiB")],
)  # fmt: skip
def test_memory_is_bounded(paths: dict[str, Path], sql: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match=message):
        store.console(paths["one"]).ask(sql, seconds=1 if "4000000000" in sql else 30)
    assert time.monotonic() - began < 40


def test_every_type_comes_back_and_can_be_kept(run: store.Run, tmp_path: Path) -> None:
    frame = ask(run, """
        select 1 as a, 2 as a, 3 as "A", sum(1) as s, 12345678901234567890123::hugeint as h, interval 3 days as i,
               [1, 2] as l, [interval 1 day] as li, {'x': 1, 'y': [2]} as st, 1.50::decimal(10, 2) as d,
               'a'::blob as b, map {'a': 1} as m, '101'::bit as bits, time '01:02:03' as t, null as n,
               timestamptz '2020-01-01 00:00:00+00' as tz, 'x'::enum('x') as e, union_value(k := 1) as u,
               [1, 2]::integer[2] as ar, date '2020-01-02' as day
    """).frame  # fmt: skip
    assert frame.columns[:3] == ["a", "a (2)", "A (3)"]
    row = frame.row(0, named=True)
    assert (row["s"], row["h"], row["i"]) == (1, "12345678901234567890123", "3 days")
    assert row["st"] == {"x": 1, "y": [2]} and row["l"] == [1, 2] and row["b"] == b"a" and str(row["d"]) == "1.50"
    frame.write_parquet(tmp_path / "a.parquet")
    assert pl.read_parquet(tmp_path / "a.parquet").height == 1


def test_limits_and_runs_that_cannot_be(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="at least one path"):
        store.console([])
    with pytest.raises(StoreError, match="above zero"):
        store.console(paths["one"]).ask("select 1", rows=0)
    (tmp_path / "bad.duckdb").write_text("no database")
    with pytest.raises(StoreError, match="cannot be read"):
        store.console(tmp_path / "bad.duckdb").ask("select 1")


def test_tables_are_browsed_page_by_page(run: store.Run) -> None:
    whole = run.table("expert_load").filter(
        (pl.col("layer") == 1) & (pl.col("tokens") >= 3) & pl.col("domain").str.contains("^c")
    )
    where = [
        store.Filter("layer", "equals", "1"),
        store.Filter("tokens", "at least", 3),
        store.Filter("domain", "matches", "^c"),
    ]
    pages = [
        store.browse(run, "expert_load", where=where, order="tokens", descending=True, start=start, rows=4)
        for start in range(0, len(whole), 4)
    ]
    assert len(whole) and {count for _, count in pages} == {len(whole)}
    joined = pl.concat([frame for frame, _ in pages])
    assert joined["tokens"].to_list() == whole["tokens"].sort(descending=True).to_list()
    assert store.browse(run, "check", where=[store.Filter("layer", "is missing")])[1] == (
        run.table("check")["layer"].null_count()
    )


@pytest.mark.parametrize(
    "bad",
    [store.Filter("nix", "equals", 1), store.Filter("tokens", "at least", "many"),
     store.Filter("domain", "matches", "("), store.Filter("domain", "equals; drop", 1), store.Filter('"', "equals", 1)],  # type: ignore[arg-type]
)  # fmt: skip
def test_conditions_that_cannot_be_are_refused(run: store.Run, bad: store.Filter) -> None:
    with pytest.raises(StoreError):
        store.browse(run, "expert_load", where=[bad])
    with pytest.raises(StoreError, match="no table"):
        store.browse(run, "nix")
    evil = store.Filter("domain", "equals", "' or true --")
    assert store.browse(run, "expert_load", where=[evil])[1] == 0


def test_all_columns_are_described(run: store.Run) -> None:
    known = store.describe()
    for (table,) in known.select("table").unique().iter_rows():
        there = run.query(f'describe "{table}"')["column_name"].to_list()
        assert sorted(known.filter(pl.col("table") == table)["column"].to_list()) == sorted(there)
