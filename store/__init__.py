"""One DuckDB file per run: written from shards, read as tables, as a trace, or with read-only SQL.

::

    import store
    run = store.open_run("runs/mine.duckdb")
    run.table("expert_load")                      # polars frame; schema.sql documents the columns
    trace = run.selections(domain="code")         # trace.ids (layers, sequences, tokens, k), -1 = none
"""

from store.answering import Answer
from store.browse import Filter, browse, describe
from store.catalog import Catalog, Entry
from store.connection import confine
from store.console import Console, console
from store.derived import write_metrics
from store.evaluations import Document, evaluation_text, list_evaluations, read_evaluation, write_evaluation
from store.examples import EXAMPLES, Example
from store.info import IMPORTED, Badge, LayerInfo, Progress, RunInfo
from store.parts import NUM_PARTS, in_every, part_of_sequence
from store.plans import list_plans, plan_path, read_plan, read_plan_document, write_plan
from store.remote import bring, located, shown
from store.run import Run, SequenceText, open_run
from store.schema import SCHEMA_VERSION, tables
from store.scores import RouterScores, pack_scores
from store.shard_target import ShardTarget, shard_target
from store.shared import SharedRun
from store.tokens import TokenIds
from store.trace import CHUNK_TOKENS, LayerSelections, Trace, none_value, pack_trace
from store.union import Union, attach
from store.version import version_of
from store.whole import refusal, replacing, write_whole
from store.writer import RunWriter, filled_tables, lacking_metrics, publish_shard

__all__ = [
    "CHUNK_TOKENS",
    "EXAMPLES",
    "IMPORTED",
    "NUM_PARTS",
    "SCHEMA_VERSION",
    "Answer",
    "Badge",
    "Catalog",
    "Console",
    "Document",
    "Entry",
    "Example",
    "Filter",
    "LayerInfo",
    "LayerSelections",
    "Progress",
    "RouterScores",
    "Run",
    "RunInfo",
    "RunWriter",
    "SequenceText",
    "ShardTarget",
    "SharedRun",
    "TokenIds",
    "Trace",
    "Union",
    "attach",
    "bring",
    "browse",
    "confine",
    "console",
    "describe",
    "evaluation_text",
    "filled_tables",
    "in_every",
    "lacking_metrics",
    "list_evaluations",
    "list_plans",
    "located",
    "none_value",
    "open_run",
    "pack_scores",
    "pack_trace",
    "part_of_sequence",
    "plan_path",
    "publish_shard",
    "read_evaluation",
    "read_plan",
    "read_plan_document",
    "refusal",
    "replacing",
    "shard_target",
    "shown",
    "tables",
    "version_of",
    "write_evaluation",
    "write_metrics",
    "write_plan",
    "write_whole",
]
