"""The one table: what is not known is a dash, and columns are as wide as they were told."""

from __future__ import annotations

import json

from streamlit.testing.v1 import AppTest


def _table() -> None:
    import polars as pl

    from app.components import table
    from app.components.table import Column

    frame = pl.DataFrame({"label": ["0", "1"], "loss": [0.5, None], "paper": [True, False], "rank": [1, None]})
    columns = {"loss": Column(width=64), "paper": Column("rule", width=58)}
    table.show(frame, key="one", alt="", columns=columns, hide=("rank",))


def test_nulls_are_dashes_and_widths_are_kept() -> None:
    tested = AppTest.from_function(_table, default_timeout=20).run()
    assert not tested.exception
    (shown,) = tested.dataframe
    assert shown.proto.placeholder == "–"
    assert list(shown.value.columns) == ["label", "loss", "paper"]
    columns = json.loads(shown.proto.columns)
    assert (columns["loss"]["width"], columns["paper"]["width"], columns["label"]["width"]) == (64, 58, "small")
    assert (columns["loss"]["label"], columns["paper"]["label"]) == ("loss", "rule")
