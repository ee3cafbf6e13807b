"""A report as one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

import plotly.graph_objects as go

from app.figures import style
from app.report.chapters import body
from app.report.document import Document, Missing, Section, Shown, Tell
from app.report.inline import text
from app.report.packing import arrays, columns, difference, packed, squeezed

Choice = Literal["auto", "light", "dark"]

LIMIT = 6_900_000
"""Bytes that a report should not exceed: tables of data give way first, the largest ones, then the largest figures."""

_STYLE = re.compile(r"""createElement\("style"\)[^']{0,200}\.textContent=('(?:[^'\\]|\\.)*')""")
"""A style sheet that Plotly's script puts into the page when it starts."""


@dataclass
class Pieces:
    """Packed content by id, each once, and how much there is."""

    by_id: dict[str, str] = field(default_factory=dict)
    _ids: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, content: str) -> str:
        """The id under which the content stands: an earlier one where it was there already."""
        known = self._ids.setdefault(hashlib.sha256(content.encode()).hexdigest(), name)
        self.by_id.setdefault(known, content)
        return known

    @property
    def size(self) -> int:
        """Characters of all pieces."""
        return sum(map(len, self.by_id.values()))


def page(document: Document, *, theme: Choice = "auto", tell: Tell = lambda _: None) -> str:
    """The whole file as text."""
    tell("packing the drawing library")
    pieces = Pieces({"plotly": _library().packed, "templates": packed(_templates())})
    tell("packing figures")
    figures, left_out = _pack_figures(document, pieces)
    tell("packing tables")
    tables = _pack_tables([one for one in _all(document) if one.anchor in figures], pieces)
    shown = [
        Section(section.title, section.anchor, tuple(one for one in section.shown if one.anchor in figures))
        for section in document.sections
    ]
    missing = [*document.missing, *left_out]
    content = body(document, [one for one in shown if one.shown], missing, figures, tables)
    return _file(document, content, pieces, theme)


def _all(document: Document) -> list[Shown]:
    return [one for section in document.sections for one in section.shown]


def _pack_figures(document: Document, pieces: Pieces) -> tuple[dict[str, str], list[Missing]]:
    """Ids of the packed figures by anchor; those that the file has no room for, the largest, are told of instead."""
    content = {one.anchor: packed(_drawing(one)) for one in _all(document)}
    room = LIMIT - pieces.size - 300_000
    dropped: set[str] = set()
    for anchor in sorted(content, key=lambda anchor: -len(content[anchor])):
        if sum(len(text) for name, text in content.items() if name not in dropped) <= room:
            break
        dropped.add(anchor)
    found = {anchor: pieces.add(f"f-{anchor}", text) for anchor, text in content.items() if anchor not in dropped}
    reason = "It is too large for a report of this size."
    titles = {one.anchor: section.title for section in document.sections for one in section.shown}
    left_out = [
        Missing(one.title, titles[one.anchor], reason, one.command(document.run, f"{one.anchor}.html"))
        for one in _all(document) if one.anchor in dropped
    ]  # fmt: skip
    return found, left_out


def _pack_tables(shown: Sequence[Shown], pieces: Pieces) -> dict[str, str]:
    """Ids of the packed data by anchor, the smallest first, as long as there is room."""
    content = {one.anchor: packed(columns(one.exhibit.frame)) for one in shown}
    found: dict[str, str] = {}
    for anchor in sorted(content, key=lambda anchor: len(content[anchor])):
        if pieces.size + len(content[anchor]) + 300_000 <= LIMIT:
            found[anchor] = pieces.add(f"t-{anchor}", content[anchor])
    return found


def _drawing(shown: Shown) -> dict[str, Any]:
    """A figure with what is different in the dark, its template left out where it is the house's."""
    light, house = _without_template(shown.exhibit.figure, "light")
    dark, house_too = _without_template(shown.dark or shown.exhibit.figure, "dark" if shown.dark else "light")
    if house != house_too:
        light, dark, house = _plain(shown.exhibit.figure), _plain(shown.dark or shown.exhibit.figure), False
    return {**light, "dark": difference(light, dark), "house": house}


def _without_template(figure: go.Figure, theme: style.Theme) -> tuple[dict[str, Any], bool]:
    content = _plain(figure)
    house = content["layout"].get("template") == style.template(theme).to_plotly_json()
    if house:
        del content["layout"]["template"]
    return content, house


def _plain(figure: go.Figure) -> dict[str, Any]:
    content = arrays(figure.to_plotly_json())
    return {"data": list(content.get("data", [])), "layout": content.get("layout", {})}


def _templates() -> dict[str, Any]:
    themes: tuple[style.Theme, ...] = ("light", "dark")
    return {theme: style.template(theme).to_plotly_json() for theme in themes}


@dataclass(frozen=True)
class Library:
    """Plotly's script, packed; the hash by which the page may run it, and those of the style sheets that it makes."""

    packed: str
    script: str
    styles: tuple[str, ...]


@cache
def _library() -> Library:
    script = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    sheets = [ast.literal_eval(found) for found in _STYLE.findall(script.decode())]
    # One sheet is made empty and then filled by rules.
    return Library(squeezed(script), _hash(script), tuple(_hash(sheet.encode()) for sheet in ("", *sheets)))


def _hash(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _own(name: str) -> str:
    return resources.files("app.report").joinpath(name).read_text(encoding="utf-8")


def _file(document: Document, content: str, pieces: Pieces, theme: Choice) -> str:
    css, script = _own("template.css"), _own("template.js")
    scripts = " ".join(f"'sha256-{one}'" for one in (_hash(script.encode()), _library().script))
    styles = " ".join(f"'sha256-{one}'" for one in (_hash(css.encode()), *_library().styles))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; style-src-attr 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    data = "\n".join(f'<script type="application/octet-stream" id="{name}">{piece}</script>'
                     for name, piece in pieces.by_id.items())  # fmt: skip
    first = "dark" if theme == "dark" else "light"
    return f"""<!doctype html>
<html lang="en" data-choice="{theme}" data-theme="{first}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="moescope {text(document.tool)}">
<title>{text(document.run)}: moescope report</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
{content}
{data}
<script>{script}</script>
</body>
</html>
"""
