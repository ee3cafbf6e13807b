"""What a metric is: a line in ``registry.py``, or declared at the end of the file that computes it, in ``METRICS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a run is the headline's business; here it is a name
    from profiler.headline.subject import Rows, Subject


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: as rows hold it.
        title: its name in words; the heading of its section in docs/metrics.md.
        unit, range: of its values.
        higher_means: how to read a larger value.
        source: the paper that defined it, "standard" or "ours".
        version: part of the key under which results are kept: raise it when the formula changes.
        differs: ours differs from the published code, and the section in the docs says how.
        rows: computes it for a finished run, with controls and intervals, for metrics whose file does that itself;
            the others have a part in ``profiler/headline/``, or are computed where they are asked for.
        section: the text of its section in docs/metrics.md, put there by ``python -m profiler.document``; empty = the
            section is written there by hand.
    """

    name: str
    title: str
    unit: str
    range: str
    higher_means: str
    source: str
    version: int = 1
    differs: bool = False
    rows: Callable[[Subject], Rows] | None = None
    section: str = ""

    @property
    def docs_anchor(self) -> str:
        """Anchor of the metric's section in docs/metrics.md."""
        return self.title.lower().replace(" ", "-")
