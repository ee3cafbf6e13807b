"""A terminal shows text from data and obeys none of it: no cursor, colour, title or direction changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Terminal:
    """A stream to a terminal that shows control characters as escapes.

    Lines and tabs stay, and so does a carriage return at either end of what is written, as progress is shown.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what may be shown of a text."""
        from app.text import shown_in_terminal

        if text.isprintable() or text == "\n":
            return self._stream.write(text)
        inner = text.strip("\r")
        start, _, end = text.partition(inner) if inner else (text, "", "")
        lines = ("\t".join(shown_in_terminal(part) for part in line.split("\t")) for line in inner.split("\n"))
        return self._stream.write(start + "\n".join(lines) + end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_output() -> Iterator[None]:
    """Standard output as a :class:`Terminal` where it is one; what goes into a file or a pipe stays as it is."""
    stream = sys.stdout
    if not stream.isatty():
        yield
        return
    sys.stdout = Terminal(stream)
    try:
        yield
    finally:
        sys.stdout = stream
