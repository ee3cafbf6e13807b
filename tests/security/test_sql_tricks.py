"""The SQL console beyond what tests/store/test_console.py refuses: tricks of spelling, of quoting and of nesting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic

import store
from moescope.errors import StoreError
from store.answering import answer

SECRET = "a secret of the machine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the run lies a file that nobody may read through it."""
    directory = tmp_path_factory.mktemp("console tricks")
    synthetic.finished(directory, "one")
    (directory / "secret.csv").write_text(f"a\n{SECRET}\n", encoding="utf-8")
    (directory / "secret.json").write_text(f'{{"a": "{SECRET}"}}', encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def run(folder: Path) -> Iterator[store.Run]:
    with store.open_run(folder / "one.duckdb") as opened:
        yield opened


READS = (
    "from '{0}/secret.csv'",
    'from "{0}/secret.csv"',
    "from read_csv_auto('{0}/secret.csv')",
    "from sniff_csv('{0}/secret.csv')",
    "from read_json('{0}/secret.json')",
    "from read_json_objects('{0}/secret.json')",
    "from read_ndjson('{0}/secret.json')",
    "from read_text('{0}/*')",
    "from glob('{0}/*')",
    "from read_blob('{0}/secret.csv')",
    "from parquet_metadata('{0}/secret.csv')",
    "from parquet_schema('{0}/a.parquet')",
    "from 'file://{0}/secret.csv'",
    "from query('from read_text(''{0}/secret.csv'')')",
    "from query_table('{0}/secret.csv')",
    "select (select content from read_text('{0}/secret.csv'))",
    "select getenv('HOME')",
    "select getvariable('a')",
    "from (values (1)) a, lateral (from read_text('{0}/secret.csv')) b",
    "with a as (from read_text('{0}/secret.csv')) from a",
    "with a as materialized (from glob('{0}/*')) from a",
    "select * exclude (filename) from read_text('{0}/secret.csv')",
    "select columns(*) from read_csv('{0}/secret.csv')",
    "from duckdb_logs",
    "from which_secret('s3://a', 's3')",
    "from read_duckdb('{0}/one.duckdb')",
    "from sqlite_scan('{0}/a', 'b')",
    "from postgres_scan('host=localhost', 'a', 'b')",
    "from 's3://a/b.parquet'",
    "from read_csv('/dev/stdin')",
    "from '/proc/self/environ'",
    "from read_text('/proc/self/environ')",
    "from read_text('{0}/../{0}/secret.csv')",
    "from read_text(['{0}/secret.csv', '{0}/secret.json'])",
    "/**/from/**/read_text/**/('{0}/secret.csv')",
    "FROM\u00a0READ_TEXT('{0}/secret.csv')",
    "from \"read_text\"('{0}/secret.csv')",
    "from main.read_text('{0}/secret.csv')",
    "from system.main.read_text('{0}/secret.csv')",
    "from read_text('{0}/secret' || '.csv')",
    "from read_text(e'{0}/\\x73ecret.csv')",
    "from read_text($${0}/secret.csv$$)",
)
HARMLESS = ("from duckdb_logs", "select getvariable('a')")
"""These are answered: a log that is empty, a variable that nobody could set."""

WRITES = (
    "select 1;; drop table layer",
    "select 1; -- ; drop table layer\n; drop table layer",
    "/* ; */ drop table data.layer",
    "copy (select 1) to '{0}/out.csv'",
    "copy (select 1) to '/dev/stdout'",
    "COPY data TO '{0}/out.parquet' (format parquet)",
    "export database '{0}/out'",
    "create temp table a as select 1",
    "create or replace temp macro a() as 1",
    "create secret a (type s3)",
    "create type a as enum ('b')",
    "create sequence a",
    "alter table layer rename to a",
    "comment on table layer is 'a'",
    "attach ':memory:' as a",
    "attach '{0}/out.duckdb' as a",
    "set memory_limit = '99GB'",
    "set global threads = 99",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "pragma memory_limit = '9GB'",
    "set variable a = 1",
    "reset all",
    "execute a",
    "deallocate a",
    "load 'a.so'",
    "force install httpfs",
    "install a from community",
    "update extensions",
    "use memory",
    "begin; select 1; commit",
    "insert into layer by name select 1 as layer",
    "merge into layer using layer on true when matched then delete",
    "truncate layer",
    "explain analyze insert into layer values (1)",
    "explain (analyze) copy layer to '{0}/out.csv'",
    "explain explain copy layer to '{0}/out.csv'",
    "with a as (insert into layer values (1) returning *) from a",
    "from query('drop table data.layer')",
    "from query('set threads = 1')",
    "call pragma_version(); drop table layer",
    "\ufeffdrop table layer",
    "\u200bdrop table layer",
    "drop\u2028table layer",
    "select 1\0; drop table layer",
    "kill 1",
    "checkpoint data",
    "force checkpoint",
    "summarize 'secret.csv'",
    "describe '{0}/secret.csv'",
)


@pytest.mark.parametrize("sql", [*READS, *WRITES])
def test_no_spelling_reads_a_file_or_writes_anything(run: store.Run, folder: Path, sql: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if sql in HARMLESS:
        assert SECRET not in str(answer(run._connection, sql, rows=100, seconds=20.0).frame.to_dicts())
    else:
        with pytest.raises(StoreError) as refused:
            answer(run._connection, sql.format(folder), rows=100, seconds=20.0)
        assert "\n" not in str(refused.value) and SECRET not in str(refused.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "sql",
    ["from duckdb_settings()", "from duckdb_secrets()", "from duckdb_databases()", "from duckdb_extensions()",
     "from duckdb_variables()", "from pragma_database_list", "from duckdb_temporary_files()", "from duckdb_views()"],
)  # fmt: skip
def test_what_duckdb_tells_of_itself_holds_no_secret(run: store.Run, sql: str) -> None:
    try:
        found = answer(run._connection, sql, rows=1000, seconds=20.0).frame
    except StoreError:
        return
    if "secrets" in sql:
        assert found.is_empty()
    if "settings" in sql:
        held = dict(zip(found["name"], found["value"], strict=True))
        assert held["enable_external_access"] == "false" and held["lock_configuration"] == "true"


@pytest.mark.parametrize(
    "sql",
    ["with recursive a as (select 1 as n union all select n from a) select count(*) from a",
     "with recursive a(n) as (select 1 union all select n + 1 from a where n > 0), b as (from a) select sum(n) from b",
     "select count(*) from route a, route b, route c, route d",
     "select sum(sin(a.range * b.range)) from range(10000000) a, range(10000000) b"],
)  # fmt: skip
def test_what_has_no_end_is_stopped(run: store.Run, sql: str) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match="stopped after|memory"):
        answer(run._connection, sql, rows=10, seconds=0.2)
    assert time.monotonic() - began < 10


def test_names_and_values_are_quoted(run: store.Run) -> None:
    for evil in ('layer"; drop table layer; --', "layer' or true --", "a\0b", "x" * 100_000, "\ud800"):
        with pytest.raises(StoreError):
            store.browse(run, evil)
        with pytest.raises(StoreError):
            store.browse(run, "layer", where=[store.Filter(evil, "equals", 1)])
        with pytest.raises(StoreError):
            store.browse(run, "layer", order=evil)
