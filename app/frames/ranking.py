"""Finalists in their order: what each saves, and what it was measured to cost."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from app.text import size
from planner.finalists import Ranked
from store.evaluations import number_or_none

_SCHEMA = {
    "preset": pl.String, "form": pl.String, "saved": pl.String, "kl": pl.Float64, "low": pl.Float64,
    "high": pl.Float64, "worst_domain": pl.String, "worst_kl": pl.Float64, "predicted": pl.Float64, "digest": pl.String,
}  # fmt: skip


def ranking(ranked: Sequence[Ranked]) -> pl.DataFrame:
    """One row per plan, the least damaging first.

    Columns: preset, form, saved; kl, low, high: KL from the model as it was, nats per token, with its interval; the
    domain that suffers most and its kl; predicted: the plan's weighed error, null where it has none; digest.
    """
    rows = []
    for one in ranked:
        found, estimate = one.measurement, one.plan.estimate
        worst = max(found.domains.items(), key=lambda item: (item[1].kl, item[0]), default=(None, None))
        rows.append(
            (one.plan.target.preset, ", ".join(dict.fromkeys(step.form for step in one.plan.for_checkpoint)),
             size(estimate.bytes_saved), found.kl, number_or_none(found.low), number_or_none(found.high), worst[0],
             worst[1].kl if worst[1] is not None else None, estimate.weighed_error, one.plan.digest)
        )  # fmt: skip
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")
