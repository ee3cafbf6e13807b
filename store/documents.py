"""JSON documents beside a run, which anyone may have written: read with bounds, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from moescope.errors import StoreError

MAX_BYTES = 64 << 20
"""Of a document; a sweep over 94 layers has a tenth of it."""


def read_text(path: str | Path) -> str:
    """The text of a document.

    Raises:
        StoreError: it cannot be read, is no text, or larger than :data:`MAX_BYTES`.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise StoreError(f"{path} has more than {MAX_BYTES >> 20} MiB, which no document beside a run has")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse(text: str, what: str, *, finite: bool = False) -> dict[str, Any]:
    """The object of a text.

    Args:
        finite: NaN and infinity, which JSON does not know, are refused.

    Raises:
        StoreError: it is no JSON object, or one that cannot be written again.
    """
    try:
        content = json.loads(text, parse_constant=_refuse if finite else None)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # halves of characters
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{what} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{what} takes one JSON object")
    return content


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")
