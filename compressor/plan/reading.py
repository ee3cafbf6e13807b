"""The text of a document from anywhere: read with bounds, and refused in one short line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moescope.errors import PlanError

MAX_BYTES = 64 << 20
"""Of a document. A plan that gives every expert of a model with 94 layers of 384 experts widths of its own has 12."""

_SHOWN = 200
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Halves of characters: in pairs they are one, alone they are nothing that can be written again."""


def read(path: str | Path) -> str:
    """The text of a file.

    Raises:
        PlanError: it cannot be read, is no text, or too large for a plan.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        require_size(len(content), str(path))
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def require_size(size: int, name: str) -> None:
    """Refuse what is larger than any plan.

    Raises:
        PlanError: it has more than :data:`MAX_BYTES`.
    """
    if size > MAX_BYTES:
        raise PlanError(f"{name} is no plan: it has more than {MAX_BYTES >> 20} MiB")


def parsed(text: str, name: str) -> Any:
    """The JSON of a text, in which no name stands twice: others may read the first one, we the last.

    Raises:
        PlanError: it is none, or too large.
    """
    require_size(len(text), name)
    try:
        content = json.loads(text, object_pairs_hook=_named_once)
        if _HALF.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{name} is no plan: {in_a_line(str(error))}") from error
    return content


def first_mistake(error: ValidationError) -> str:
    """Where a document is wrong, and what is."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return in_a_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def in_a_line(text: str) -> str:
    """Words that may hold parts of a document, as one line of bounded length."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * _SHOWN])
    line = " ".join(line.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return found
