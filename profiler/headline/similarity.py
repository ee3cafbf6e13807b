"""How far the kinds of expert similarity agree in every layer, beside what renamed experts give."""

from __future__ import annotations

from typing import Any

from profiler.headline.similarity_kinds import matrices
from profiler.headline.subject import SEED, Rows, Subject, as_text
from profiler.metrics.similarity_agreement import agreement

MOST_EXPERTS = 512
"""Experts of a layer up to which agreement is computed: renaming them takes a minute per layer above."""


def similarity_rows(subject: Subject) -> Rows:
    """Spearman, Kendall, R^2 and the Mantel test of every two kinds, in every layer in which there are two kinds.

    The rows of control "renamed" hold the median of what renamed experts give, and the ends of 95 % of it.
    """
    rows: Rows = []
    for (layer, step), found in matrices(subject.run):
        if len(found) < 2 or len(next(iter(found.values()))) > MOST_EXPERTS:
            continue
        for pair in agreement(similarities=found, seed=SEED):
            if pair.p_value != pair.p_value:
                continue
            place: dict[str, Any] = {"layer": layer, "step": step, "at": float(pair.pairs)}
            place |= {"parameters": as_text({"first": pair.first, "second": pair.second})}
            values = {
                "similarity_agreement": pair.spearman,
                "similarity_kendall": pair.kendall,
                "similarity_r_squared": pair.r_squared,
                "similarity_p_value": pair.p_value,
            }
            rows += [{**place, "metric": name, "value": value} for name, value in values.items()]
            band = {"value": pair.middle, "low": pair.low, "high": pair.high}
            rows.append({**place, "metric": "similarity_agreement", "control": "renamed", **band})
    return rows
