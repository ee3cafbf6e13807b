"""Text from data made safe for Markdown, wherever it is shown."""

from __future__ import annotations

from app.text import shown_in_terminal


def plain(text: str, limit: int = 80) -> str:
    """Text from data for Markdown: one line, without the characters that Markdown or HTML read."""
    line = _line(text, limit)
    return "".join("\\" + letter if letter in r"\`*_{}[]()<>#+-.!|~:$&" else letter for letter in line)


def code(text: str, limit: int = 200) -> str:
    """Text from data as inline code for Markdown, where nothing but the backtick has a meaning."""
    return "`" + _line(text, limit).replace("`", "'") + "`"


def _line(text: str, limit: int) -> str:
    """One line of at most so many characters, with those that turn the direction of what follows as escapes."""
    line = shown_in_terminal(" ".join(text[: 16 * limit].split()))
    return line if len(line) <= limit and len(text) <= 16 * limit else line[: limit - 1] + "…"
