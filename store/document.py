"""The run file's schema as a Markdown page, made from ``schema.sql``: ``python -m store.document > docs/schema.md``."""

from __future__ import annotations

from collections.abc import Iterator

from store.derived import COLUMNS
from store.schema import SCHEMA_VERSION, tables, views

_HEAD = f"""# The run file

*Made by `python -m store.document` from `store/schema.sql`; a test compares the two. Schema version {SCHEMA_VERSION}.*

A finished run is one DuckDB file, `NAME.duckdb`, never written again. Any DuckDB opens it:

```sql
attach 'runs/mine.duckdb' as mine (read_only);
select layer, expert, sum(tokens) from mine.expert_load where domain = 'code' group by all order by 3 desc;
```

Beside it lie `NAME.live/` (Parquet shards while the run is collected), `NAME.derived.duckdb` (metric results; may be
deleted and computed again), `NAME.evaluations/` (what was measured on the model) and `NAME.plans/` (plans made from the
run, receipts of applying them, recommendations, and jobs), both as JSON.

Common columns: **layer** counts the model's decoder layers, dense ones included; **step** is 0 unless a layer calls its
experts several times; **kind** is routed or shared; **domain** is the label of the text; **phase** is prompt or decode;
**position** counts the real (not padding) tokens of a sequence from 0. Sums are stored, never means: divide when
reading.

The rule says how rows of different shards, and of different hosts, add up: *key* (rows with equal keys become one),
*sum*, *max*, *at c* (the value beside the largest value of column c), *row* (a plain union of rows).
"""


def markdown() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_tables(), *_views(), *_derived()])


def _tables() -> Iterator[str]:
    for table in tables().values():
        yield f"## {table.name}\n\n{_sentence(table.meaning)}\n"
        yield "| column | type | rule | meaning |\n|---|---|---|---|"
        for column in table.columns:
            yield f"| {column.name} | {column.type} | {column.rule} | {column.meaning.replace('|', chr(92) + '|')} |"
        yield ""


def _views() -> Iterator[str]:
    for name in views():
        yield f"## {name} (view)\n"
        yield "The trace, one row per selection: sequence, position, layer, step, rank (0 = largest gate weight),"
        yield "expert, weight.\n"


def _derived() -> Iterator[str]:
    yield "## metric_value (in `NAME.derived.duckdb`)\n"
    yield "One row per value of a metric; `docs/metrics.md` says what each metric means.\n"
    yield "| column | type |\n|---|---|"
    yield from (f"| {name} | {kind} |" for name, kind in COLUMNS.items())
    yield ""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    print(markdown(), end="")
