"""An exhibit of several runs on a page: drawn anew each time, since it depends on files beside the run's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app import data, state
from app.components import chart
from app.exhibits.exhibit import Absent, Exhibit
from store import Run


def compare_chart(maker: Callable[..., Exhibit], run: Run, *, key: str, **choices: Any) -> bool:
    """Draw it, or say why it is not there; whether it was drawn. Its frames are cached by the versions of all files."""
    try:
        made = maker(run, frames=data.frame, theme=state.theme(), **choices)
    except Absent as missing:
        chart.absent(missing)
        return False
    chart.show(made.figure, made.frame, key=key, read=made.read, alt=made.alt, rests_on=made.rests_on)
    return True
