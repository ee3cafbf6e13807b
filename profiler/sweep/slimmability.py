"""The curve of loss over the number of experts, and whether it falls all along; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from profiler.metrics.divergence import mean_of_items
from profiler.sweep.estimates import plain


def slimmability(rows: Sequence[Mapping[str, Any]], *, predictions: Sequence[int], own: float) -> dict[str, Any] | None:
    """What the rows of rule ``top_k`` say together; None with fewer than two.

    Args:
        rows: of a sweep, with ``value`` and ``loss_sums`` (sequences,).
        predictions: (sequences,) predicted tokens.
        own: experts per token of the model's own router.

    Returns:
        ``own``; ``steps``: per pair of neighbouring numbers ``from``, ``to`` and ``change``: the loss at the larger
        less that at the smaller, nats per token, paired, with its interval; ``monotone``: True where the loss falls
        with every step up to the model's own number; ``best``: the number of least loss.
    """
    curve = sorted((row for row in rows if row["rule"] == "top_k"), key=lambda row: float(row["value"]))
    if len(curve) < 2:
        return None
    items = np.asarray(predictions, dtype=np.float64)
    steps: list[dict[str, Any]] = []
    for less, more in zip(curve, curve[1:], strict=False):
        found = mean_of_items(sums=np.subtract(more["loss_sums"], less["loss_sums"]), items=items)
        steps.append({"from": int(less["value"]), "to": int(more["value"]), "change": plain(found)})
    up = [step for step in steps if step["to"] <= own]
    return {
        "own": own,
        "steps": steps,
        "monotone": all(step["change"]["value"] < 0 for step in up) if up else None,
        "best": int(min(curve, key=lambda row: sum(row["loss_sums"]))["value"]),
    }
