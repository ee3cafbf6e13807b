"""The chapters of a report as HTML: everything that can be read without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
import polars as pl

from app.findings.finding import Finding
from app.report.document import FURTHER, Document, Missing, Section, Shown, further_command
from app.report.inline import markdown, text

_FIRST_ROWS = 6

_EVIDENCE_HEAD = (
    '<tr><th>evidence</th><th class="number">value</th><th>95 % interval or range</th><th>beside</th><th>from</th></tr>'
)
_WIDTHS = f"<colgroup>{'<col>' * 5}</colgroup>"
_FINDINGS_HEAD = (
    '<div class="finding head" aria-hidden="true"><div></div><div class="wide">'
    f'<table class="evidence">{_WIDTHS}{_EVIDENCE_HEAD}</table></div></div>'
)


def body(
    document: Document, sections: Sequence[Section], missing: Sequence[Missing], figures: dict[str, str],
    tables: dict[str, str],
) -> str:  # fmt: skip
    anchors = {one.name: one.anchor for section in reversed(sections) for one in reversed(section.shown)}
    parts = [
        _head(document),
        _chapter("Findings", "findings", _FINDINGS_HEAD + "".join(_finding(one, anchors) for one in document.findings)),
        _chapter("Provenance", "provenance", _facts(document.provenance)),
        *(_chapter(section.title, section.anchor, _layers(document, section) + "".join(
            _figure(one, document.run, figures[one.anchor], tables.get(one.anchor)) for one in section.shown
        )) for section in sections),
        _chapter("What is absent", "absent", _missing(missing)) if missing else "",
        _chapter("Further figures", "further", _further(document)),
        _chapter("Methods", "methods", _methods(document.methods)) if len(document.methods) else "",
        _chapter("Words", "words", _glossary(document.glossary)),
        _chapter("How this was made", "made", _made(document)),
    ]  # fmt: skip
    return f'<div class="frame">{_contents(document, sections, missing)}<main>{"".join(parts)}</main></div>'


def _chapter(title: str, anchor: str, content: str) -> str:
    return f'<section id="{text(anchor)}"><h2>{text(title)}{_link(anchor)}</h2>{content}</section>'


def _link(anchor: str) -> str:
    return f'<a class="anchor" href="#{text(anchor)}" title="Copy the link to this place">link</a>'


def _head(document: Document) -> str:
    words = {"valid": "capture valid", "warning": "capture doubtful", "invalid": "capture invalid"}
    badge = words.get(document.badge.status, "capture unchecked")
    live = f'<p class="note">{text(document.live)}</p>' if document.live else ""
    return (
        f"<h1>{text(document.run)}</h1>"
        f'<p><span class="badge {text(document.badge.status)}">{badge}</span> {text(document.badge.reason, 400)}</p>'
        f'<p class="muted">Routing of the experts of {text(document.model)}.</p>{live}'
        '<noscript><p class="note">Scripts are off: the figures are not drawn. Findings, the first rows of every'
        " figure's data and all other text can be read.</p></noscript>"
    )


def _contents(document: Document, sections: Sequence[Section], missing: Sequence[Missing]) -> str:
    switch = "".join(f'<button type="button" data-choose="{choice}" aria-pressed="false">{choice}</button>'
                     for choice in ("auto", "light", "dark"))  # fmt: skip
    items = [("Findings", "findings", ()), ("Provenance", "provenance", ())]
    items += [(section.title, section.anchor, section.shown) for section in sections]  # type: ignore[misc]
    items += [("What is absent", "absent", ())] if missing else []
    items += [("Further figures", "further", ())]
    items += [("Methods", "methods", ())] if len(document.methods) else []
    items += [("Words", "words", ()), ("How this was made", "made", ())]
    listed = "".join(
        f'<li><a href="#{text(anchor)}">{text(title)}</a>' + (_inner(shown) if shown else "") + "</li>"
        for title, anchor, shown in items
    )
    return (
        f'<nav aria-label="Contents"><div class="tools switch" hidden>{switch}'
        f'<button type="button" data-do="print">print</button></div>'
        f"<details open><summary>Contents</summary><ol>{listed}</ol></details></nav>"
    )


def _inner(shown: Iterable[Shown]) -> str:
    """Entries of one page; those of single layers on one line."""
    lines: dict[str, str] = {}
    for one in shown:
        if one.layer is None:
            lines[one.name] = f'<a href="#{text(one.anchor)}">{text(one.title)}</a>'
        else:
            start = lines.get(one.name, f"{text(one.title.rpartition(',')[0])}, layer")
            lines[one.name] = f'{start} <a href="#{text(one.anchor)}">{text(one.layer)}</a>'
    return "<ol>" + "".join(f"<li>{line}</li>" for line in lines.values()) + "</ol>"


def _finding(one: Finding, anchors: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><td>{text(proof.name)}</td><td class="{"" if isinstance(proof.value, str) else "number"}">'
        f"{text(proof.shown)}</td><td>{text(proof.interval)}</td>"
        f"<td>{text(proof.beside)}</td><td>{_source(proof.source, anchors.get(proof.exhibit))}</td></tr>"
        for proof in one.evidence
    )  # fmt: skip
    table = f'<table class="evidence">{_WIDTHS}<thead>{_EVIDENCE_HEAD}</thead><tbody>{rows}</tbody></table>'
    proof = f'<div class="wide">{table}</div>' if rows else ""
    said = f'<div><h3>{text(one.subject)}</h3><p class="sentence">{text(one.sentence)}</p></div>'
    return f'<div class="finding {one.tone}">{said}<div>{proof}</div></div>'


def _source(source: str, anchor: str | None) -> str:
    return f'<a href="#{text(anchor)}">{text(source or "figure")}</a>' if anchor else text(source)


def _facts(frame: pl.DataFrame) -> str:
    rows, last = [], ""
    for group, what, value in frame.iter_rows():
        shown = f"<code>{text(value)}</code>" if "SHA" in what or "fingerprint" in what else text(value)
        named = text(group) if group != last else ""
        rows.append(f'<tr><td class="group">{named}</td><th scope="row">{text(what)}</th><td>{shown}</td></tr>')
        last = group
    return f'<div class="wide"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'


def _layers(document: Document, section: Section) -> str:
    """Which layers stand for all, where the section shows single ones."""
    if all(one.layer is None for one in section.shown):
        return ""
    chosen = "; ".join(f"layer {text(one.label)} ({text(', '.join(one.reasons))})" for one in document.layers)
    return f'<p class="muted">What is of one layer is shown for the most telling ones: {chosen}.</p>'


def _figure(one: Shown, run: str, piece: str, table: str | None) -> str:
    name = f"{text(one.anchor)}"
    file = text("".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in f"{run}-{one.anchor}"))
    told = f'data-plot="p-{name}" data-file="{file}"'
    buttons = "".join(
        f'<button type="button" data-do="{what}" {told}>{what.upper()}</button>' for what in ("svg", "png", "csv")
    )
    rests = f'<p class="rests">{markdown(one.exhibit.rests_on)}</p>' if one.exhibit.rests_on else ""
    data = f' data-frame="{text(table)}"' if table else ""
    plot = (
        f'<div class="plot" id="p-{name}" data-piece="{text(piece)}" data-height="{_height(one.exhibit.figure)}"{data}'
        f' role="img" aria-label="{text(one.exhibit.alt)}"><p class="waiting">{text(one.exhibit.alt)}</p></div>'
    )
    words = f'<div class="words"><p>{markdown(one.exhibit.read)}</p>{rests}<div class="tools" hidden>{buttons}</div>'
    return (
        f'<article class="figure" id="{name}"><h3>{text(one.title)}{_link(one.anchor)}</h3>'
        f'<div class="body">{plot}{words}{_data(one, run, whole=table is not None)}</div></div></article>'
    )


def _data(one: Shown, run: str, *, whole: bool) -> str:
    frame = one.exhibit.frame
    rows = _table(frame.head(_FIRST_ROWS))
    more = f"{len(frame):,} row{'' if len(frame) == 1 else 's'}; " + (
        "all of them: CSV above, numbers to 1 part in 8,192, or exactly" if whole
        else "too many for this file, CSV above gives what is drawn; all of them"
    )  # fmt: skip
    return (
        f'<details class="data"><summary>data: {len(frame):,} rows</summary>{rows}'
        f"<p>{more}: <code>{text(one.command(run, f'{one.anchor}.csv'))}</code></p></details>"
    )


def _table(frame: pl.DataFrame) -> str:
    right = [kind.is_numeric() for kind in frame.dtypes]
    head = "".join(f'<th class="{"number" if number else ""}">{text(name)}</th>'
                   for name, number in zip(frame.columns, right, strict=True))  # fmt: skip
    rows = "".join(
        "<tr>" + "".join(f'<td class="{"number" if number else ""}">{text(_cell(value), 80)}</td>'
                         for value, number in zip(row, right, strict=True)) + "</tr>"
        for row in frame.iter_rows()
    )  # fmt: skip
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _height(figure: go.Figure) -> int:
    return int(figure.layout.height or 420)


def _missing(missing: Sequence[Missing]) -> str:
    rows = "".join(
        f"<tr><td>{text(one.title)}</td><td>{text(one.page)}</td><td>{text(one.reason)}"
        + (f'<code class="remedy">{text(one.remedy)}</code>' if one.remedy else "") + "</td></tr>"
        for one in missing
    )  # fmt: skip
    head = "<tr><th>figure</th><th>page</th><th>why it is not here, and what would change it</th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _further(document: Document) -> str:
    rows = "".join(
        f"<tr><td>{text(one.page)}</td><td>"
        + "; ".join(f"{text(title)} <code>{text(name)}</code>" for name, title in one.exhibits)
        + "</td></tr>"
        for one in document.further
    )
    table = f"<table><thead><tr><th>page</th><th>figures</th></tr></thead><tbody>{rows}</tbody></table>"
    command = text(further_command(document.run))
    return f'<p class="muted">{text(FURTHER, 400)}</p><pre><code>{command}</code></pre><div class="wide">{table}</div>'


def _methods(frame: pl.DataFrame) -> str:
    """Methods by level and class of the survey."""
    rows, last = [], ("", "")
    for row in frame.iter_rows(named=True):
        place = (row["level"], row["group"])
        level = row["level"] if row["level"] != last[0] else ""
        group = row["group"] if place != last else ""
        here = "yes" if row["available"] else "no"
        rest = (row[name] for name in ("method", "paper", "here", "where", "needs"))
        values = (level, group, *rest, here, row["reason"] or "")
        rows.append("<tr>" + "".join(f"<td>{text(value)}</td>" for value in values) + "</tr>")
        last = place
    names = ("level", "class", "method", "paper", "here", "where", "needs", "this run has it", "why not, or a remark")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _glossary(words: Iterable[tuple[str, str]]) -> str:
    return (
        '<dl class="glossary">'
        + "".join(f"<dt>{text(word)}</dt><dd>{text(said)}</dd>" for word, said in words)
        + "</dl>"
    )


def _made(document: Document) -> str:
    return (
        f"<pre><code>{text(document.command)}</code></pre><p>moescope {text(document.tool)}. This file asks the network"
        " for nothing: figures and data lie in it, compressed. Long columns of numbers are kept to 1 part in 8,192;"
        " whole numbers are exact.</p>"
    )
