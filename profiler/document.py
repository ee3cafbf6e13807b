"""Puts what metrics and formats say of themselves into docs/metrics.md and docs/importers.md.

``python -m profiler.document``, at the root of a checkout, writes the sections of all metrics and formats whose files
hold them (``section``); the rest of both pages is written by hand and stays as it is. A test compares the two.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from profiler.importers.format import Format
from profiler.importers.registry import FORMATS
from profiler.metrics.metric import Metric
from profiler.metrics.registry import METRICS

_AFTER_FORMATS = "## What cannot be computed from what"
_Pieces = list[tuple[str, str]]


def metrics_page(page: str, metrics: Sequence[Metric] = METRICS) -> str:
    """docs/metrics.md with the sections of ``metrics`` that have one; a new one stands behind the metric before it."""
    pieces = _pieces(page)
    before = ""
    for one in metrics:
        heading = f"### {one.title}"
        if one.section:
            facts = f"- Range: {one.range}; unit: {one.unit}\n- Source: {one.source}"
            place = _index(pieces, before) + 1 if before else len(pieces)
            _put(pieces, heading, f"{inspect.cleandoc(one.section)}\n{facts}\n\n", place)
        before = heading
    return _joined(pieces)


def importers_page(page: str, formats: Sequence[Format] = FORMATS) -> str:
    """docs/importers.md with a row and a section of each of ``formats`` that has one."""
    before = ""
    for one in formats:
        if one.section:
            row = f"| `{one.name}` | {one.source} | `{one.path}` | {one.gives} |"
            page = _with_row(page, row, f"| `{before}` |")
        before = one.name
    pieces = _pieces(page)
    for one in formats:
        if one.section:
            text = f"\n{inspect.cleandoc(one.section)}\n\n"
            _put(pieces, f"## `{one.name}`", text, _index(pieces, _AFTER_FORMATS))
    return _joined(pieces)


def _pieces(page: str) -> _Pieces:
    """The page cut before its headings: (heading, what follows up to the next one)."""
    cut = re.split(r"^(?=#{2,3} )", page, flags=re.MULTILINE)
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in cut]


def _joined(pieces: _Pieces) -> str:
    return "\n".join(f"{heading}\n{text.rstrip()}\n" if text.strip() else f"{heading}\n" for heading, text in pieces)


def _index(pieces: _Pieces, heading: str) -> int:
    return [piece[0] for piece in pieces].index(heading)


def _put(pieces: _Pieces, heading: str, text: str, place: int) -> None:
    """Let the section of that heading be ``text``; a new one comes to ``place``."""
    known = [piece[0] for piece in pieces]
    if heading in known:
        pieces[known.index(heading)] = (heading, text)
    else:
        pieces.insert(place, (heading, text))


def _with_row(page: str, row: str, before: str) -> str:
    """The page whose first table has the row: in the place of the one with the same name, else behind ``before``."""
    lines = page.splitlines(keepends=True)
    name = row[: row.index("|", 1) + 1]
    at = [number for number, line in enumerate(lines) if line.startswith(name)]
    if at:
        lines[at[0]] = row + "\n"
    else:
        behind = [number for number, line in enumerate(lines) if line.startswith(before)]
        lines.insert(behind[0] + 1, row + "\n")
    return "".join(lines)


def main() -> None:
    """Write both pages."""
    for name, put in (("metrics", metrics_page), ("importers", importers_page)):
        path = Path("docs") / f"{name}.md"
        path.write_text(put(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
