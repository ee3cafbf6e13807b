"""Text from data made safe for Markdown, wherever it is shown."""

from __future__ import annotations


def plain(text: str, limit: int = 80) -> str:
    """Text from data for Markdown: one line, without the characters that Markdown or HTML read."""
    line = " ".join(text.split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return "".join("\\" + letter if letter in r"\`*_{}[]()<>#+-.!|~:$" else letter for letter in line)


def code(text: str, limit: int = 200) -> str:
    """Text from data as inline code for Markdown, where nothing but the backtick has a meaning."""
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line if len(line) <= limit else line[: limit - 1] + '…'}`"
