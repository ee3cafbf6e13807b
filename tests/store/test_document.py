"""The page about the schema says what the schema says."""

from __future__ import annotations

from pathlib import Path

from store.document import markdown
from store.schema import tables

PAGE = Path(__file__).parents[2] / "docs" / "schema.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run: python -m store.document > docs/schema.md"


def test_rules_are_known_and_merge_targets_exist() -> None:
    for table in tables().values():
        names = {column.name for column in table.columns}
        rules = {column.rule for column in table.columns}
        assert rules == {"row"} or table.keys, table.name
        for column in table.columns:
            assert column.rule in ("key", "sum", "max", "row") or column.rule.removeprefix("at ") in names, column
