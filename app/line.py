"""The line on stderr that says how far work is: each is printed over the last one."""

from __future__ import annotations

import sys

_open = False
"""The last line has not been ended."""


def over(words: str, *, stays: bool = False) -> None:
    """Print a line over the last one.

    Args:
        words: of it, cut to the terminal's width.
        stays: the next line stands below it.
    """
    from app.text import progress_line

    global _open
    print("\r" + progress_line(words), end="\n" if stays else "", file=sys.stderr, flush=True)
    _open = not stays


def end() -> None:
    """Let what is printed next stand below the line, if there is one."""
    global _open
    if _open:
        print(file=sys.stderr, flush=True)
    _open = False


def clear() -> None:
    """Take the line away, if there is one."""
    from app.text import progress_line

    global _open
    if _open:
        print("\r" + progress_line("") + "\r", end="", file=sys.stderr, flush=True)
    _open = False
