"""Several checkpoints in order: measures of collapse per layer of each, what is over its threshold, and since when.

Nothing here is a mean over layers, in which a collapsed layer would vanish: every summary has its worst layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

import store
from app.frames import comparison
from app.frames.timeline_measures import COUNTS, KEYS, MEASURES, VALUES, collapse
from app.frames.timeline_order import short_names
from moescope.errors import InputError

LONG = {"run": pl.String, "place": pl.Int64, "checkpoint": pl.String, **KEYS, **VALUES}


def over_checkpoints(runs: Sequence[store.Run], parts: Sequence[pl.DataFrame] | None = None) -> pl.DataFrame:
    """The measures of collapse of several runs in order: run, place, checkpoint, layer, step, label, measure, value,
    threshold, over.

    Args:
        runs: the checkpoints in order; layers and numbers of experts must be the same in all.
        parts: :func:`collapse` of each, where it is known already.

    Raises:
        InputError: a run has other layers or numbers of experts than the last one.
    """
    require_one_shape(runs)
    names = short_names([run.name for run in runs])
    frames = [
        (collapse(run) if parts is None else parts[place]).with_columns(
            run=pl.lit(run.name), place=pl.lit(place, pl.Int64), checkpoint=pl.lit(names[place])
        )
        for place, run in enumerate(runs)
    ]
    return pl.concat(frame.select(list(LONG)) for frame in frames)


def agreement(runs: Sequence[store.Run], *, by_position: bool = False) -> pl.DataFrame:
    """Router saturation of every run but the last, in the columns of :func:`over_checkpoints`.

    Raises:
        InputError: a run has no text in common with the last one, or no trace.
    """
    require_one_shape(runs)
    return agreement_of(comparison.saturation(runs, by_position=by_position), runs)


def agreement_of(found: pl.DataFrame, runs: Sequence[store.Run]) -> pl.DataFrame:
    """``app.frames.comparison.saturation`` of the runs in the columns of :func:`over_checkpoints`."""
    names = short_names([run.name for run in runs])
    places = pl.DataFrame(
        {"run": [run.name for run in runs], "place": range(len(runs)), "checkpoint": names},
        schema_overrides={"place": pl.Int64},
    )
    frame = found.join(places, on="run", how="left", maintain_order="left").with_columns(
        measure=pl.lit("agreement"), value=pl.col("saturation"), threshold=pl.col("popularity")
    )
    return frame.with_columns(over=(pl.col("value") <= pl.col("threshold")).fill_null(False)).select(list(LONG))


def summary(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per checkpoint and measure of a frame of :func:`over_checkpoints`: worst value with its layer, the 90th
    percentile over layers towards the worst, the median, the best, and how many layers are over.

    Columns: measure, run, place, checkpoint, worst, worst_label, near (90th percentile), median, best, layers, over.
    """
    rows = []
    known = frame.drop_nulls("value")
    for (measure, place), part in known.group_by("measure", "place", maintain_order=True):
        high = MEASURES[str(measure)].worst == "high"
        values = part["value"].to_numpy()
        worst = int(np.argmax(values) if high else np.argmin(values))
        near, median = np.percentile(values, [90 if high else 10, 50])
        best = values.min() if high else values.max()
        rows.append(
            (
                measure, part["run"][0], place, part["checkpoint"][0], float(values[worst]), part["label"][worst],
                float(near), float(median), float(best), len(part), int(part["over"].sum()),
            )
        )  # fmt: skip
    order = {name: place for place, name in enumerate(MEASURES)}
    rows.sort(key=lambda row: (order[row[0]], row[2]))
    return pl.DataFrame(rows, schema=_SUMMARY, orient="row")


def alerts(frame: pl.DataFrame) -> pl.DataFrame:
    """One row per measure and layer that is, or was, over its threshold; those that still are come first.

    Columns: measure, label, since = first checkpoint of the latest time over, until = the last of it, stands = it is
    over at the last checkpoint that was measured, value and threshold there, excess = how far over (for counts the
    number, else the distance in parts of the threshold), detail = a sentence.
    """
    rows = []
    known = frame.drop_nulls("value").sort("place")
    for (measure, label), part in known.group_by("measure", "label", maintain_order=True):
        over = part["over"].to_numpy()
        if not over.any():
            continue
        last = int(np.flatnonzero(over)[-1])
        calm = np.flatnonzero(~over[: last + 1])
        first = int(calm[-1]) + 1 if len(calm) else 0
        row, stands = part.row(last, named=True), last == len(over) - 1
        rows.append(
            (
                measure, label, row["layer"], row["step"], part["checkpoint"][first], row["checkpoint"], stands,
                row["value"], row["threshold"], _excess(str(measure), row["value"], row["threshold"]),
                _sentence(str(measure), str(label), part["checkpoint"][first], row, stands, first == 0),
            )
        )  # fmt: skip
    order = {name: place for place, name in enumerate(MEASURES)}
    rows.sort(key=lambda row: (not row[6], order[row[0]], -row[9]))
    return pl.DataFrame(rows, schema=_ALERTS, orient="row")


def require_one_shape(runs: Sequence[store.Run]) -> None:
    """Check that all runs have the layers and the numbers of experts of the last one.

    Raises:
        InputError: a run has others; the message names it.
    """
    last = runs[-1]
    wanted = [(one.layer, one.step, one.num_experts) for one in last.layers]
    for run in runs[:-1]:
        if [(one.layer, one.step, one.num_experts) for one in run.layers] != wanted:
            raise InputError(
                f"run {run.name!r} has other MoE layers or numbers of experts than {last.name!r}: checkpoints of one "
                "model have one shape; leave it out"
            )


def texts(runs: Sequence[store.Run]) -> int:
    """How many different texts the runs were recorded on, by hash; a run that states none counts as one of its own."""
    return len({str(run.info.settings.get("corpus_sha256") or f"? {run.name}") for run in runs})


def _excess(measure: str, value: float, threshold: float) -> float:
    if measure in COUNTS:
        return value
    return abs(value - threshold) / abs(threshold) if threshold else abs(value)


def _sentence(measure: str, label: str, since: str, row: dict[str, Any], stands: bool, always: bool) -> str:
    """Which layer, since which checkpoint, how far over."""
    found, threshold = MEASURES[measure], row["threshold"]
    value, at = format(row["value"], found.digits), row["checkpoint"]
    if measure in COUNTS:
        kind = "nearly dead" if measure == "nearly_dead" else "dead"
        words = f"Layer {label}: {value} {kind} expert{'s' if row['value'] != 1 else ''} at {at}"
    elif found.worst == "high":
        words = f"Layer {label}: {found.short} {value} at {at}, {row['value'] / threshold:.2f} times its threshold of"
        words += f" {threshold:.3g}"
    else:
        below = 100 * _excess(measure, row["value"], threshold)
        words = f"Layer {label}: {found.short} {value} at {at}, {below:.0f} % below its threshold of {threshold:.3g}"
    if stands:
        return f"{words}; {'from the first checkpoint on' if always else f'since {since}'}."
    return f"{words}; no longer after it."


_SUMMARY = {"measure": pl.String, "run": pl.String, "place": pl.Int64, "checkpoint": pl.String, "worst": pl.Float64,
            "worst_label": pl.String, "near": pl.Float64, "median": pl.Float64, "best": pl.Float64, "layers": pl.Int64,
            "over": pl.Int64}  # fmt: skip
_ALERTS = {"measure": pl.String, "label": pl.String, "layer": pl.Int32, "step": pl.Int32, "since": pl.String,
           "until": pl.String, "stands": pl.Boolean, "value": pl.Float64, "threshold": pl.Float64,
           "excess": pl.Float64, "detail": pl.String}  # fmt: skip
