"""One reading statement on locked runs, within limits of rows, time and memory; and the process that does it.

A process of its own, because not all that DuckDB does can be stopped or bounded from inside: one call of ``repeat``
writes gigabytes that its memory limit does not count and looks at no interrupt.
"""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass

import duckdb
import polars as pl

from moescope.errors import MoescopeError, StoreError
from store import connection, remote
from store.run import open_run
from store.union import attach

MEMORY = "512MB"
"""What DuckDB may hold."""

PROCESS_BYTES = 2 << 30
"""What the process may hold in all, where the system can say so."""

ANSWER_BYTES = 64 << 20
"""The largest answer."""

GRACE = 1.0
"""Seconds after the limit until what looks at no interrupt is ended."""

_READING = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}
_EXPLAIN = re.compile(r"\s*explain\s+(analyze\s+)?(\([^)]*\)\s*)?", re.IGNORECASE)
_PLAIN = {
    "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger", "ubigint", "float",
    "double", "decimal", "varchar", "blob", "date", "time", "uuid", "timestamp", "timestamp_s", "timestamp_ms",
    "timestamp_ns", "timestamp with time zone",
}  # fmt: skip
"""Types that every reader of an answer knows, also in lists and structs; others travel as text."""


@dataclass(frozen=True)
class Answer:
    """What a statement answers.

    Attributes:
        frame: the rows, at most as many as were asked for; columns of equal names are numbered.
        seconds: how long DuckDB took.
        cut: there are more rows than were asked for.
    """

    frame: pl.DataFrame
    seconds: float
    cut: bool


def answer(opened: duckdb.DuckDBPyConnection, sql: str, *, rows: int, seconds: float) -> Answer:
    """The answer of one reading statement on a locked connection; it is interrupted after ``seconds``.

    Raises:
        StoreError: not exactly one SELECT, EXPLAIN, DESCRIBE, SHOW or SUMMARIZE; SQL that DuckDB refuses; or a limit.
    """
    cursor = opened.cursor()
    timer = threading.Timer(seconds, cursor.interrupt)
    began = time.perf_counter()
    timer.start()
    try:
        _require_reading(cursor, sql)
        relation, big = _with_plain_columns(cursor.sql(sql))
        frame: pl.DataFrame = relation.limit(rows + 1).pl()
    except duckdb.InterruptException:
        raise StoreError(stopped(seconds)) from None
    except (duckdb.OutOfMemoryException, MemoryError):
        raise StoreError(f"the query needs more than {MEMORY} of memory: group or filter first") from None
    except duckdb.Error as error:
        raise StoreError(f"the query failed: {one_line(error, sql)}") from None
    finally:
        timer.cancel()
        cursor.close()
    if frame.estimated_size() > ANSWER_BYTES:
        raise StoreError(
            f"the answer takes {frame.estimated_size() / 1e6:,.0f} MB, more than the {ANSWER_BYTES >> 20} MiB that are "
            "handed out: ask for fewer rows or columns, or for parts of lists and texts"
        )
    frame = frame.with_columns([_whole(frame[name]) for name in big])
    return Answer(frame.head(rows), time.perf_counter() - began, len(frame) > rows)


def stopped(seconds: float) -> str:
    """What is said of a statement that took too long."""
    return f"the query was stopped after {seconds:g} s: filter first, or look at fewer layers or sequences"


def one_line(error: duckdb.Error, sql: str) -> str:
    """DuckDB's message as one line, with the place where it can be told."""
    lines = str(error).splitlines() or [type(error).__name__]
    said = lines[0]
    if len(lines) > 1 and lines[1].startswith(("Did you mean", "Candidate bindings")):
        said += f" {lines[1]}"
    for index, line in enumerate(lines[:-1]):
        match = re.match(r"LINE (\d+): ", line)
        if match and "^" in lines[index + 1]:
            number, shown = int(match[1]), line[match.end() :]
            before = lines[index + 1].index("^") - match.end()
            # Long lines are shown in part, between dots.
            text = shown.removeprefix("...").removesuffix("...")
            written = sql.splitlines()[number - 1] if number <= len(sql.splitlines()) else ""
            column = max(written.find(text), 0) + before - (len(shown) - len(shown.removeprefix("..."))) + 1
            return f"{said} (line {number}, column {max(column, 1)})"
    return said


def _require_reading(cursor: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = cursor.extract_statements(sql)
    kinds = [connection.kind_of(statement) for statement in statements]
    if kinds == [duckdb.StatementType.EXPLAIN]:  # EXPLAIN ANALYZE runs what it explains
        explained = _EXPLAIN.match(statements[0].query)
        inner = cursor.extract_statements(statements[0].query[explained.end() :]) if explained else []
        inside = [connection.kind_of(one) for one in inner]
        kinds = [duckdb.StatementType.EXPLAIN if kind in _READING else kind for kind in inside]
    if len(kinds) != 1 or kinds[0] not in _READING:
        raise StoreError(
            "only one statement at a time that reads: SELECT, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN; a run is never "
            "written, and files, settings and extensions are shut"
        )


def _with_plain_columns(relation: duckdb.DuckDBPyRelation) -> tuple[duckdb.DuckDBPyRelation, list[str]]:
    """Columns of different names and of types that everyone reads; and the names of those of 128-bit integers."""
    names: list[str] = []
    parts: list[str] = []
    big: list[str] = []
    for place, (name, kind) in enumerate(zip(relation.columns, relation.types, strict=True), start=1):
        unique, count = name, 1
        while unique.lower() in [known.lower() for known in names]:
            count += 1
            unique = f"{name} ({count})"
        names.append(unique)
        if kind.id in ("hugeint", "uhugeint"):
            big.append(unique)
        value = f"#{place}" if _is_plain(kind) else f"#{place}::varchar"
        parts.append(f'{value} as "{unique.replace(chr(34), chr(34) * 2)}"')
    if names == relation.columns and not any("::varchar" in part for part in parts):
        return relation, big
    return relation.project(", ".join(parts)), big


def _whole(texts: pl.Series) -> pl.Series:
    """Integers of 128 bits, which sums are, as those of 64 bits; as text where one does not fit."""
    numbers = texts.cast(pl.Int64, strict=False)
    return numbers if numbers.null_count() == texts.null_count() else texts


def _bound(seconds: float) -> None:
    """End this process after so many seconds whatever it does, and keep its memory below a limit; where it can be."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles the signal, so that it ends the process
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = PROCESS_BYTES if most == resource.RLIM_INFINITY else min(PROCESS_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _is_plain(kind: duckdb.sqltypes.DuckDBPyType) -> bool:
    if kind.id in ("list", "array", "struct"):
        return all(_is_plain(child) for _, child in kind.children if isinstance(child, duckdb.sqltypes.DuckDBPyType))
    return kind.id in _PLAIN


def main() -> None:
    """Read one question as JSON, write what came of it: a line of JSON, then the frame as Arrow."""
    asked = json.loads(sys.stdin.buffer.read())
    try:
        remote.stay()
        connection.confine(memory_limit=MEMORY, threads="2", temp_directory="", max_temp_directory_size="0B")
        opened = attach(asked["paths"]) if len(asked["paths"]) > 1 else open_run(asked["paths"][0])
        _bound(float(asked["seconds"]) + GRACE)
        found = answer(opened._connection, asked["sql"], rows=int(asked["rows"]), seconds=float(asked["seconds"]))
        buffer = io.BytesIO()
        found.frame.write_ipc(buffer)
        head: dict[str, object] = {"seconds": found.seconds, "cut": found.cut}
        body = buffer.getvalue()
    except MoescopeError as error:
        head, body = {"error": str(error)}, b""
    except MemoryError:
        head, body = {"error": "the query needs more memory than it may take"}, b""
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + body)
    sys.stdout.buffer.flush()
