"""Parts that read each layer by itself, so that layers may be read one after the other or on several machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from profiler.headline.subject import Rows, Subject


@dataclass(frozen=True)
class LayerPart:
    """A part of the metrics: what a layer gives, and the rows that all layers give together.

    Attributes:
        name: what it computes, in words.
        layer: what one entry of ``run.layers`` gives, from nothing but the run: small, and without references to it.
        rows: rows from what the layers gave, in their order.
        needs_trace: nothing is computed for a run without selections.
    """

    name: str
    layer: Callable[[Subject, int], Any]
    rows: Callable[[Subject, Iterable[Any]], Rows]
    needs_trace: bool = True

    def __call__(self, subject: Subject) -> Rows:
        """The rows of a run, computed here."""
        return self.rows(subject, (self.layer(subject, axis) for axis in self.axes(subject)))

    def axes(self, subject: Subject) -> range:
        """The entries of ``run.layers`` that are to be read."""
        return range(0 if self.needs_trace and not subject.has_trace else len(subject.run.layers))


def joined(subject: Subject, found: Iterable[Rows]) -> Rows:
    """``rows`` of parts whose layers give rows."""
    return [row for rows in found for row in rows]
