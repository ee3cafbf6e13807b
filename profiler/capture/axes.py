"""Labels of sequences on axes of the caller's: their names, and values as text."""

from __future__ import annotations

import re
from typing import Any

from moescope.errors import InputError

TAKEN = ("domain", "expert", "layer", "phase", "position", "sequence", "step", "token")
"""Axes that every run has, so that no caller's may have their names."""

LONGEST = 200
"""Characters of a value; an axis has as many points as values, so they are labels and no texts."""

_NAME = re.compile(r"[^\W\d]\w{0,59}")


def require_axis(name: str) -> None:
    """Check that an axis can have this name.

    Raises:
        InputError: it is taken, or no word of letters, digits and underscores.
    """
    if name in TAKEN:
        raise InputError(f"axis {name!r} has a meaning of its own: name it otherwise, such as my_{name}")
    if not _NAME.fullmatch(name):
        raise InputError(f"axis {name!r} is no name: use at most 60 letters, digits and underscores, a letter first")


def is_single(given: Any) -> bool:
    """Whether one value was given, not one per row: a text, a number, a truth value, or a tensor without axes."""
    return isinstance(given, str | bytes) or not hasattr(given, "__iter__") or getattr(given, "ndim", 1) == 0


def axis_value(axis: str, value: Any) -> str:
    """A value as the text that is stored: 250, 250.0 and a tensor of it are all "250".

    Raises:
        InputError: neither text nor a finite number, or longer than 200 characters.
    """
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    if not isinstance(plain, str | bool | int | float) or plain != plain or plain in (float("inf"), -float("inf")):
        raise InputError(
            f"a value of axis {axis!r} is {type(value).__name__} {str(value)[:40]!r}: give text or numbers"
        )
    text = " ".join(str(plain).split())
    if not text or len(text) > LONGEST:
        raise InputError(f"a value of axis {axis!r} has {len(text)} characters: give 1 to {LONGEST}")
    return text
