"""Registry, functions and documentation say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from profiler.metrics.registry import METRICS, Metric, metric

DOCS = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
SECTIONS = {
    re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-"): text
    for title, text in re.findall(r"^### (.+)\n([^#]*(?:\n(?!#).*)*)", DOCS, flags=re.MULTILINE)
}


@pytest.mark.parametrize("one", METRICS, ids=lambda one: one.name)
def test_every_metric_has_its_section(one: Metric) -> None:
    assert one.docs_anchor in SECTIONS, f"docs/metrics.md has no section '### {one.title}'"
    section = SECTIONS[one.docs_anchor]
    assert "\n- Formula: " in f"\n{section}"
    assert re.search(rf"^- Range: {re.escape(one.range)}; unit: {re.escape(one.unit)}", section, flags=re.MULTILINE)
    source = re.search(r"^- Source: (.+)", section, flags=re.MULTILINE)
    assert source is not None
    number = re.search(r"\d{4}\.\d{5}", one.source)
    assert (number.group() if number else one.source) in section
    assert ("- Differs from the published code: " in section) == one.differs


def test_every_section_is_registered() -> None:
    assert list(SECTIONS) == [one.docs_anchor for one in METRICS]


def test_names_are_unique_and_found() -> None:
    assert len({one.name for one in METRICS}) == len({one.docs_anchor for one in METRICS}) == len(METRICS)
    assert metric("srp").title == "Segment routing best performance"
    assert all(one.version >= 1 and one.higher_means and one.source for one in METRICS)
    with pytest.raises(KeyError):
        metric("nothing")
