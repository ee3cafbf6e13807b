"""Registry, files and documentation of scores say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import store
from planner.importance.registry import SCORES, Score, find

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "importance.md").read_text(encoding="utf-8")
SECTIONS = {
    re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-"): text
    for title, text in re.findall(r"^### (.+)\n([^#]*(?:\n(?!#).*)*)", DOCS, flags=re.MULTILINE)
}
SHARED_FILES = {"__init__", "agreement", "entry", "expressions", "registry", "selection", "set_error", "statistics"}


@pytest.mark.parametrize("one", SCORES, ids=lambda one: one.name)
def test_every_score_has_its_file_and_section(one: Score) -> None:
    assert one.function.__name__ == one.name
    assert one.function.__doc__
    section = f"\n{SECTIONS[one.docs_anchor]}"
    assert "\n- Formula: " in section
    assert f"\n- Level: {one.level}; unit: {one.unit}\n" in section
    assert f"\n- Source: {one.source}\n" in section
    assert ("\n- Differs from the published code: " in section) == one.differs


def test_every_section_and_file_is_registered() -> None:
    assert sorted(SECTIONS) == sorted(one.docs_anchor for one in SCORES)
    files = {path.stem for path in (ROOT / "planner" / "importance").glob("*.py")}
    assert files - SHARED_FILES == {one.name for one in SCORES}
    assert len({one.name for one in SCORES}) == len({one.docs_anchor for one in SCORES}) == len(SCORES)


def test_sections_stand_in_the_order_of_the_registry() -> None:
    order = [one.docs_anchor for one in SCORES]
    assert list(SECTIONS) == order


def test_levels_are_those_of_the_schema() -> None:
    meanings = " ".join(table.meaning for table in store.tables().values())
    for one in SCORES:
        assert f"Level {one.level}." in meanings, one.name
    assert find("reap").granularity == "expert"
