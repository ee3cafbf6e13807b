"""Text for a page: escaped, and the little Markdown that exhibits use turned into HTML."""

from __future__ import annotations

import html
import re

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_TOKEN = re.compile(
    r"\\(?P<escaped>[\\`*_{}\[\]()<>#+\-.!|~:$])|`(?P<code>[^`]*)`|\*\*(?P<strong>.+?)\*\*|\*(?=\S)(?P<em>[^*]+?)(?<=\S)\*"
    r"|\[(?P<link>[^\]]*)\]\([^)]*\)|:material/\w+:|(?P<line>  \n)|:(?P<colour>[a-z]+)\[(?P<coloured>[^\]]*)\]",
    re.DOTALL,
)


def clean(value: str) -> str:
    """Text without control characters and without marks that turn its direction."""
    return _CONTROL.sub("", value)


def text(value: object, limit: int = 2000) -> str:
    """Text from data for HTML, also inside attributes: one line, without control characters, escaped."""
    line = " ".join(clean(str(value)).split())
    return html.escape(line if len(line) <= limit else line[: limit - 1] + "…")


def markdown(source: str) -> str:
    """Inline Markdown as HTML: escapes, code, strong and emphasis; links and colours keep their words alone."""
    parts, at = [], 0
    source = clean(source)
    for found in _TOKEN.finditer(source):
        parts += [html.escape(source[at : found.start()]), _html(found)]
        at = found.end()
    return "".join([*parts, html.escape(source[at:])])


def _html(found: re.Match[str]) -> str:
    if (escaped := found["escaped"]) is not None:
        return html.escape(escaped)
    if (code := found["code"]) is not None:
        return f"<code>{html.escape(code)}</code>"
    if (strong := found["strong"]) is not None:
        return f"<strong>{markdown(strong)}</strong>"
    if (em := found["em"]) is not None:
        return f"<em>{markdown(em)}</em>"
    words = found["link"] if found["link"] is not None else found["coloured"]
    return markdown(words) if words is not None else "<br>" if found["line"] else ""
