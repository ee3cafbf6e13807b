"""One DuckDB file per run: written from shards, read as tables, as a trace, or with read-only SQL.

::

    import store
    run = store.open_run("runs/mine.duckdb")
    run.table("expert_load")                      # polars frame; schema.sql documents the columns
    trace = run.selections(domain="code")         # trace.ids (layers, sequences, tokens, k), -1 = none
"""

from store.catalog import Catalog, Entry
from store.derived import write_metrics
from store.info import Badge, LayerInfo, Progress, RunInfo
from store.run import Run, SequenceText, open_run, version_of
from store.schema import SCHEMA_VERSION, tables
from store.trace import CHUNK_TOKENS, Trace, none_value, pack_trace
from store.union import Union, attach
from store.writer import RunWriter

__all__ = [
    "CHUNK_TOKENS",
    "SCHEMA_VERSION",
    "Badge",
    "Catalog",
    "Entry",
    "LayerInfo",
    "Progress",
    "Run",
    "RunInfo",
    "RunWriter",
    "SequenceText",
    "Trace",
    "Union",
    "attach",
    "none_value",
    "open_run",
    "pack_trace",
    "tables",
    "version_of",
    "write_metrics",
]
