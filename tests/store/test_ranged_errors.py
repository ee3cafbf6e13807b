"""What a store refuses while DuckDB reads a run through it."""

from __future__ import annotations

from typing import Any

import duckdb
import pytest

from store.connection import said

pytest.importorskip("fsspec")


def test_an_error_that_comes_through_duckdb_is_told_in_its_own_words() -> None:
    from store.remote.objects import Object
    from store.remote.ranged import OneRun
    from store.remote.refusals import Unreachable

    class Silent:
        def piece(self, *_: Any) -> bytes:
            raise Unreachable("s3://bucket/runs: the service does not answer")

    with duckdb.connect() as connection:
        connection.register_filesystem(OneRun(Silent(), Object("a.duckdb", 4096, "", 0.0)))  # type: ignore[arg-type]
        with pytest.raises(duckdb.Error) as caught:
            connection.execute(f"attach '{OneRun.PATH}' as data (read_only)")
    assert said(caught.value) == "s3://bucket/runs: the service does not answer"
