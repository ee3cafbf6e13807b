"""Runs of the schema before: read as they are, with what came later empty; alone and beside new ones."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest

import store
from moescope.errors import StoreError
from store import RunInfo, RunWriter
from store.schema import OLDEST_VERSION, SCHEMA_VERSION

NEW_TABLES = (
    "expert_part", "load_span", "expert_weight_similarity", "omission", "expert_error", "expert_grid", "sequence_label",
)  # fmt: skip
NEW_COLUMNS = (
    ("sequence_token", "predicted"),
    ("expert_vector", "input_max"),
    ("expert_output", "stream_square_sum"),
    ("expert_output", "stream_gate_sum"),
    ("expert_similarity", "groups"),
    ("expert_similarity", "group_tokens"),
    ("expert_similarity", "hsic_sum"),
    ("expert_similarity", "unbiased_hsic_sum"),
)


def _write(directory: Path, name: str, *, version: int) -> Path:
    writer = RunWriter.create(directory, name, RunInfo(model="toy", schema_version=version))
    writer.write_shard(
        {
            "sequence": {"sequence": [0], "domain": ["code"], "tokens": [2], "prompt_tokens": [2]},
            "layer": {"layer": [0], "step": [0], "num_experts": [2], "top_k": [1]},
            "expert_load": {
                "layer": [0, 0], "step": [0, 0], "expert": [0, 1], "kind": ["routed"] * 2, "domain": ["code"] * 2,
                "phase": ["prompt"] * 2, "tokens": [1, 1],
            },
            "expert_part": {"layer": [0], "step": [0], "expert": [0], "kind": ["routed"], "tokens": [[1] + [0] * 15]},
        }
    )  # fmt: skip
    path = writer.finish()
    if version < SCHEMA_VERSION:
        with duckdb.connect(str(path)) as connection:
            for table in NEW_TABLES:
                connection.execute(f"drop table {table}")
            for table, column in NEW_COLUMNS:
                if table == "sequence_token":  # its index would forbid to alter it
                    connection.execute("drop index sequence_token_by_sequence")
                connection.execute(f"alter table {table} drop column {column}")
    return path


def test_an_older_run_reads_with_what_came_later_empty(tmp_path: Path) -> None:
    path = _write(tmp_path, "old", version=OLDEST_VERSION)
    with store.open_run(path) as run:
        assert run.info.schema_version == OLDEST_VERSION
        assert run.table("expert_load")["tokens"].to_list() == [1, 1]
        for table in NEW_TABLES:
            frame = run.table(table)
            assert frame.is_empty()
            assert frame.columns == [column.name for column in store.tables()[table].columns]
        assert "predicted" in run.table("sequence_token").columns
        assert run.omissions == {}


def test_old_and_new_runs_side_by_side(tmp_path: Path) -> None:
    paths = [_write(tmp_path, "old", version=OLDEST_VERSION), _write(tmp_path, "new", version=SCHEMA_VERSION)]
    union = store.attach(paths)
    assert union.query("select run, sum(tokens)::int as n from expert_load group by run order by run").rows() == [
        ("new", 2),
        ("old", 2),
    ]
    assert union.query("select run, tokens[1] as first from expert_part").rows() == [("new", 1)]
    union.close()


@pytest.mark.parametrize("version", [OLDEST_VERSION - 1, SCHEMA_VERSION + 1])
def test_other_schemas_are_refused_with_both_versions(tmp_path: Path, version: int) -> None:
    path = _write(tmp_path, "other", version=SCHEMA_VERSION)
    with duckdb.connect(str(path)) as connection:
        connection.execute("update run set schema_version = ?", [version])
    with pytest.raises(StoreError, match=f"schema {version}, this moescope reads schema {OLDEST_VERSION} to"):
        store.open_run(path)
