"""Frames as text for a terminal."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import polars as pl

from moescope.sizes import size as size

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What would move the cursor, colour the terminal or turn the direction of its text; halves of characters."""


def table(frame: pl.DataFrame, *, rows: int | None = 60) -> str:
    """The frame as an aligned table; ``rows`` None prints all of them.

    Numbers keep four significant digits; what is left out is counted below the table. Control characters in text are
    shown as escapes, so that a cell is one line and tells the terminal nothing.
    """
    shown = frame if rows is None else frame.head(rows)
    cells = [[_cell(value) for value in row] for row in shown.iter_rows()]
    names = [shown_in_terminal(name) for name in shown.columns]
    widths = [max([len(name), *(len(row[index]) for row in cells)]) for index, name in enumerate(names)]
    right = [dtype.is_numeric() for dtype in shown.dtypes]
    lines = [_line(names, widths, right), _line(["-" * width for width in widths], widths, right)]
    lines += [_line(row, widths, right) for row in cells]
    if len(shown) < len(frame):
        lines.append(f"... {len(frame) - len(shown)} more rows; --json prints all")
    return "\n".join(lines)


def shown_in_terminal(text: str) -> str:
    """Text from data with its control characters as escapes, such as ``\\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def progress_line(text: str) -> str:
    """The text cut and padded to the terminal's width, to be printed over the last one."""
    width = max(20, shutil.get_terminal_size((100, 20)).columns - 1)
    return shown_in_terminal(text)[:width].ljust(width)


def duration(seconds: float | None) -> str:
    """Seconds as ``45 s``, ``3 min 20 s`` or ``2 h 05 min``; unknown is a dash."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def from_here(path: Path) -> str:
    """A path as it is typed in the folder that this process was started in; a URL, of what is in a remote store."""
    from store import shown

    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else shown(path)


def sentence(text: str) -> str:
    """Words as a sentence: a capital first, a full stop at the end."""
    return text[:1].upper() + text[1:].removesuffix(".") + "."


def _line(cells: list[str], widths: list[int], right: list[bool]) -> str:
    parts = [
        cell.rjust(width) if is_number else cell.ljust(width)
        for cell, width, is_number in zip(cells, widths, right, strict=True)
    ]
    return "  ".join(parts).rstrip()


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return shown_in_terminal(str(value))
