"""A report as Markdown: the same words and tables with the key numbers, for a ticket or a repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from app.findings.finding import Finding
from app.images import picture, write_whole
from app.markdown import code
from app.report.document import FURTHER, Document, Shown, Tell, further_command
from app.report.inline import clean

_ROWS = 3
_LONGEST = 400
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def text(document: Document, *, figures: dict[str, str] | None = None) -> str:
    """The whole file as text.

    Args:
        figures: paths of pictures by anchor, see :func:`pictures`; figures without one are told of in words.
    """
    parts = [f"# {_plain(document.run)}", f"**capture {document.badge.status}**: {_plain(document.badge.reason)}"]
    parts += [f"> {_plain(document.live)}"] if document.live else []
    parts += ["## Findings", *(_finding(one) for one in document.findings)]
    parts += ["## Provenance", _table(["", "what", "value"], document.provenance.rows())]
    for section in document.sections:
        parts += [f"## {_plain(section.title)}", *(_figure(one, document.run, figures or {}) for one in section.shown)]
    if document.layers:
        told = "; ".join(f"layer {one.label}: {', '.join(one.reasons)}" for one in document.layers)
        parts.append(f"The most telling layers: {_plain(told)}.")
    if document.missing:
        rows = [(one.title, one.page, one.reason, one.remedy) for one in document.missing]
        parts += [
            "## What is absent",
            _table(["figure", "page", "why", "what would change it"], rows, last_is_code=True),
        ]
    listed = [(one.page, title, name) for one in document.further for name, title in one.exhibits]
    parts += [
        "## Further figures",
        FURTHER,
        code(further_command(document.run)),
        _table(["page", "figure", "name"], listed),
    ]
    if len(document.methods):
        parts += ["## Methods", _table(["level", "class", "this run has", "and lacks"], _methods(document.methods))]
    parts += ["## Words", "\n".join(f"- **{_plain(word)}**: {_plain(said)}" for word, said in document.glossary)]
    parts += ["## How this was made", code(document.command), f"moescope {_plain(document.tool)}."]
    return "\n\n".join(parts) + "\n"


def pictures(document: Document, folder: Path, *, tell: Tell = lambda _: None) -> dict[str, str]:
    """Write every figure as SVG into a folder; paths by anchor.

    Raises:
        InputError: kaleido or a browser is missing.
        RunError: the browser could not draw one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = [one for section in document.sections for one in section.shown]
    paths = {one.anchor: folder / f"{one.anchor}.svg" for one in shown}
    for number, one in enumerate(shown, 1):
        tell(f"drawing picture {number} of {len(shown)}")
        write_whole(paths[one.anchor], picture(one.exhibit.figure, "svg", width=900))
    return {anchor: str(path) for anchor, path in paths.items()}


def _finding(one: Finding) -> str:
    mark = {"problem": "**Problem.** ", "attention": "**Look at this.** ", "unknown": "", "plain": ""}[one.tone]
    said = f"**{_plain(one.subject)}.** {mark}{_plain(one.sentence)}"
    if not one.evidence:
        return said
    rows = [(proof.name, proof.shown, proof.interval, proof.beside, proof.source) for proof in one.evidence]
    return f"{said}\n\n{_table(['evidence', 'value', 'interval', 'beside', 'from'], rows)}"


def _figure(one: Shown, run: str, figures: dict[str, str]) -> str:
    made = one.exhibit
    parts = [f"### {_plain(one.title)}", clean(made.read) + (f" *{clean(made.rests_on)}*" if made.rests_on else "")]
    if one.anchor in figures:
        parts.append(f"![{_plain(made.alt)}](<{figures[one.anchor]}>)")
    few = made.frame.head(_ROWS)
    parts.append(_table(few.columns, few.rows()))
    more = f"{len(made.frame):,} rows; all of them: " if len(made.frame) > _ROWS else ""
    parts.append(f"{more}{code(one.command(run, f'{one.anchor}.csv'))}")
    return "\n\n".join(part for part in parts if part)


def _methods(frame: pl.DataFrame) -> list[tuple[str, str, str, str]]:
    """One row per class of the survey: the methods that the run can feed, and the others with the reason."""
    rows = []
    for (level, group), part in frame.group_by("level", "group", maintain_order=True):
        has = part.filter("available")["method"].to_list()
        lacks = part.filter(~pl.col("available") & (pl.col("method") != "")).select("method", "reason").rows()
        rows.append((str(level), str(group), "; ".join(has), "; ".join(f"{name} ({why})" for name, why in lacks)))
    return rows


def _table(names: Sequence[str], rows: Sequence[Sequence[object]], *, last_is_code: bool = False) -> str:
    lines = [f"| {' | '.join(map(_plain, names))} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        cells = [_cell(value) for value in row]
        if last_is_code and row[-1]:
            cells[-1] = code(str(row[-1]).replace("|", "/"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, pl.Series):
        value = value.to_list()
    return _plain(f"{value:.4g}" if isinstance(value, float) else value)


def _plain(value: object) -> str:
    """Text from data on one line, which never stands at a line's beginning, so that few characters need an escape."""
    line = " ".join(clean(str(value)).split())
    line = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return "".join(_ENTITIES.get(letter, "\\" + letter if letter in r"\`*_[]|~$#" else letter) for letter in line)
