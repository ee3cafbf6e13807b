"""The charts of the page Placement, section by section."""

from __future__ import annotations

from typing import Any

from app.components import chart
from app.exhibits import placement as exhibits
from app.frames.placement import Placed
from store import Run


def balance(run: Run, found: Placed, chosen: dict[str, Any]) -> None:
    """Balancedness per layer, by passes and windows, and how passes spread."""
    if found.verdict is None:
        chart.exhibit(exhibits.windows, run, key="balance-windows", **chosen)
        return
    with chart.pair():
        chart.exhibit(exhibits.passes, run, key="passes", **chosen)
        chart.exhibit(exhibits.balance, run, key="balance-passes", **chosen)
    with chart.pair():
        chart.exhibit(exhibits.pass_sizes, run, key="pass-sizes", **chosen)
        chart.exhibit(exhibits.windows, run, key="balance-windows", **chosen)


def devices(run: Run, found: Placed, chosen: dict[str, Any]) -> None:
    """Load of every device, before and after; slots where experts have several."""
    with chart.pair():
        chart.exhibit(exhibits.loads_before, run, key="load-before", **chosen)
        chart.exhibit(exhibits.loads_after, run, key="load-after", **chosen)
    if found.replicas:
        chart.exhibit(exhibits.slots, run, key="replicas", **chosen)


def traffic(run: Run, found: Placed, chosen: dict[str, Any]) -> None:
    """What crosses devices."""
    with chart.pair():
        chart.exhibit(exhibits.traffic, run, key="traffic-remote", **chosen)
        if len(found.labels) > 1:
            chart.exhibit(exhibits.moves, run, key="traffic-moves", **chosen)
        else:
            chart.exhibit(exhibits.spread, run, key="traffic-devices", **chosen)


def movement(run: Run, chosen: dict[str, Any]) -> None:
    """What has to be sent."""
    chart.exhibit(exhibits.movement, run, key="movement", **chosen)


def domains(run: Run, chosen: dict[str, Any]) -> None:
    """Domain by domain."""
    chart.exhibit(exhibits.domain_balance, run, key="placement-domains", **chosen)
