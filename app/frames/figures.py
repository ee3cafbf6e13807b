"""All exhibits as one frame: what there is, what can be chosen, and whether a run has each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl

import store
from app import exhibits
from app.exhibits import Absent, Entry
from app.exhibits.choices import Choice, choices_of
from moescope.errors import MoescopeError

_SCHEMA = {
    "name": pl.String,
    "title": pl.String,
    "page": pl.String,
    "choices": pl.String,
    "here": pl.Boolean,
    "reason": pl.String,
}


def listed() -> pl.DataFrame:
    """One row per exhibit, without a run: name, title, page (address), choices (NAME=DEFAULT, or NAME=ONE|OTHER)."""
    rows = [(one.name, one.title, one.page, choices(one)) for one in exhibits.entries().values()]
    names = ("name", "title", "page", "choices")
    return pl.DataFrame(rows, schema={name: _SCHEMA[name] for name in names}, orient="row")


def figures(run: store.Run, *, tell: Callable[[str], None] = lambda _: None) -> pl.DataFrame:
    """As :func:`listed`, with here (this run can fill it) and reason (why not; else empty). Draws each one."""
    kept: dict[object, Any] = {}

    def frames(maker: Callable[..., Any], of: store.Run, /, **arguments: Any) -> Any:
        key = (maker, of.path, tuple(sorted(arguments.items())))
        if key not in kept:
            kept[key] = maker(of, **arguments)
        return kept[key]

    rows = []
    every = list(exhibits.entries().values())
    for number, one in enumerate(every, start=1):
        tell(f"looking at figure {number} of {len(every)}")
        reason = ""
        try:
            exhibits.make(one.name, run, frames=frames)
        except Absent as missing:
            reason = f"{missing.reason} {missing.remedy}".strip()
        except MoescopeError as error:
            reason = str(error)
        rows.append((one.name, one.title, one.page, choices(one), not reason, reason))
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def choices(entry: Entry) -> str:
    """The choices of an exhibit as text."""
    return ", ".join(_choice(one) for one in choices_of(entry).values())


def _choice(one: Choice) -> str:
    if one.options is not None:
        return f"{one.name}={'|'.join(one.options)}"
    return one.name if one.default is None else f"{one.name}={one.default}"
