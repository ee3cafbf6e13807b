"""What an exhibit is: one figure, the data behind it, the sentence that says how to read it, and what it rests on.

Pages, the report and ``moescope figure`` show the same exhibits, so that a chart says the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import plotly.graph_objects as go
import polars as pl

import store
from moescope.errors import InputError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Exhibit:
    """One chart with its words.

    Attributes:
        figure: what is drawn.
        frame: the data behind it, for downloads.
        read: one or two sentences of Markdown on how to read it; text from data in it is safe already.
        alt: what the figure shows, for those who do not see it.
        rests_on: number of tokens, interval or source, where they apply; Markdown too.
    """

    figure: go.Figure
    frame: pl.DataFrame
    read: str
    alt: str
    rests_on: str = ""


class Absent(InputError):
    """A run cannot fill an exhibit.

    Attributes:
        reason: why, as one sentence without Markdown.
        remedy: the command that would fill it; empty where nothing would.
    """

    def __init__(self, reason: str, *, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}".strip())
        self.reason, self.remedy = reason, remedy


class Frames(Protocol):
    """How an exhibit gets its frames, and what else several of them share: :func:`fresh`, or a page's cache."""

    def __call__(self, maker: Callable[..., Made], run: store.Run, /, **arguments: Any) -> Made:
        """What ``maker(run, **arguments)`` returns."""
        ...


def fresh(maker: Callable[..., Made], run: store.Run, /, **arguments: Any) -> Made:
    """What ``maker`` makes, made now."""
    return maker(run, **arguments)


@dataclass(frozen=True)
class Entry:
    """An exhibit in the list of all: see ``app/exhibits/__init__.py``.

    Attributes:
        name: what ``moescope figure RUN NAME`` takes, with dashes.
        make: ``make(run, *, frames=fresh, theme="light", **choices) -> Exhibit``; raises :class:`Absent`. Each choice
            has a default and one of the annotations ``str``, ``int``, ``float``, ``bool``, ``Literal[...]``, or
            one of them ``| None``. Choices named ``domain``, ``phase``, ``layer``, ``expert`` mean the same everywhere.
        title: what it shows, in a few words.
        page: address of the page that shows it.
        report: whether the report shows it, drawn with its defaults.
        layers: whether it is of one layer (choice ``layer``), so that the report shows it for the most telling ones.
    """

    name: str
    make: Callable[..., Exhibit]
    title: str
    page: str
    report: bool = True
    layers: bool = field(default=False)
