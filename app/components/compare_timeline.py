"""Several checkpoints in order: which ones, what is over its threshold, and each measure, layer by layer."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, table
from app.components.compare_chart import compare_chart
from app.components.table import Column
from app.exhibits import timeline as exhibits
from app.exhibits.exhibit import Absent
from app.frames import timeline
from app.frames.timeline_measures import MEASURES
from app.frames.timeline_order import Order, alike
from store import Entry, Run

_ORDERS = {"step": "by the step in the name", "date": "by date", "chosen": "as chosen"}
_FIRST = "max_violation"
SAID = 6
"""Alerts that are said in full; the table holds all."""


def compare_timeline(run: Run, others: dict[str, Entry]) -> None:
    """Choose checkpoints, then alerts, one measure over them, its map of layers, and load against probability."""
    chosen, order, measure = _choose(run, others)
    paths = [str(run.path) if name == run.name else str(others[name].path) for name in chosen]
    try:
        found = exhibits.checkpoints(run, data.frame, ",".join(paths), order=order)
        frame = exhibits.measured(run, data.frame, found)
    except Absent as missing:
        st.info(state.plain(missing.reason, 400), icon=":material/timeline:")
        if len(chosen) < 2:
            st.caption(
                "Choose the runs of the checkpoints above; without a choice, the runs whose names differ "
                "from this one's in their numbers only are taken."
            )
        return
    if measure == "agreement":
        frame = _with_agreement(run, found, frame)
    _texts(run, found)
    _alerts(timeline.alerts(frame))
    names = {"others": ",".join(found.paths), "order": "chosen"}
    with chart.pair():
        compare_chart(
            exhibits.over_time, run, key="timeline-lines", measure=measure, layer=focus.current().layer, **names
        )
        compare_chart(exhibits.by_layer, run, key="timeline-map", measure=measure, **names)
    _last(frame)
    _probability(run, found)


def _choose(run: Run, others: dict[str, Entry]) -> tuple[list[str], Order, str]:
    """The runs, this one among them (by themselves those of the same training), their order, and the measure shown."""
    names = sorted([run.name, *others])
    own = alike(run.name, names)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        with st.container(width="stretch"):
            none = ", ".join(own) if len(own) > 1 else "choose the runs of the checkpoints"
            none = none if len(none) < 90 else f"{len(own)} runs named alike"
            chosen = state.choose_some(
                "Checkpoints", names, key="checkpoints", none=none,
                help="Without a choice: the runs whose names differ from this one's in their numbers only.",
            )  # fmt: skip
        with st.container(width="content"):
            asked = state.choose("Order", list(_ORDERS), key="order", words=_ORDERS.__getitem__)
        with st.container(width="content"):
            words = {name: one.title for name, one in MEASURES.items()}
            measure = state.choose("Measure", list(words), key="measure", default=_FIRST, words=words.__getitem__)
    order: Order = "date" if asked == "date" else "chosen" if asked == "chosen" else "step"
    chosen = chosen or own
    return (chosen if run.name in chosen else [*chosen, run.name]), order, measure


def _with_agreement(run: Run, found: exhibits.Checkpoints, frame: pl.DataFrame) -> pl.DataFrame:
    """The measures and the agreement with the last checkpoint, where the texts are the same."""
    try:
        with st.spinner("Comparing every checkpoint with the last one, token by token"):
            return pl.concat([frame, exhibits.measured(run, data.frame, found, measure="agreement")])
    except Absent:
        return frame  # the chart says why


def _texts(run: Run, found: exhibits.Checkpoints) -> None:
    count = exhibits.texts(run, data.frame, found)
    if count > 1:
        st.caption(
            f":material/info: These {len(found.paths)} runs were recorded on {count} different texts. Measures of "
            "collapse can be set side by side, but another text loads experts otherwise; agreement takes the same text."
        )


def _alerts(frame: pl.DataFrame) -> None:
    stands = frame.filter("stands")
    if stands.is_empty():
        st.success("Nothing is over its threshold at the last checkpoint.", icon=":material/check_circle:")
    else:
        said = [state.plain(sentence, 300) for sentence in stands["detail"].head(SAID)]
        more = f"\n\nAnd {len(stands) - SAID} more, in the table." if len(stands) > SAID else ""
        st.warning("\n".join(f"- {sentence}" for sentence in said) + more, icon=":material/warning:")
    if len(frame):
        titles = {name: measure.title for name, measure in MEASURES.items()}
        with st.expander(f"All alerts ({len(frame)})", icon=":material/table:"):
            table.show(
                frame.with_columns(pl.col("measure").replace(titles)), key="timeline-alerts", bordered=False,
                hide=("detail",), alt="Alerts: measure, layer, since and until which checkpoint, value and threshold",
                columns={
                    "measure": Column("measure", "text"), "since": Column("since", "text"),
                    "until": Column("until", "text"), "stands": Column("stands", "text"),
                    "excess": Column("over by", "figure", "experts, or the distance in parts of the threshold"),
                },
                read="Stands: over at the last checkpoint. A row shows its layer.",
            )  # fmt: skip


def _last(frame: pl.DataFrame) -> None:
    """Every measure at the last checkpoint beside the first."""
    found = timeline.summary(frame)
    ends = found.group_by("measure", maintain_order=True).agg(
        pl.col("checkpoint").last(), pl.col("worst").first().alias("first_worst"), pl.col("worst").last(),
        pl.col("worst_label").last().alias("label"), pl.col("near", "median", "over", "layers").last(),
    )  # fmt: skip
    limits = frame.group_by("measure").agg(
        pl.when(pl.col("threshold").n_unique() == 1).then(pl.col("threshold").first()).alias("threshold")
    )
    shown = ends.join(limits, on="measure", how="left", maintain_order="left")
    table.show(
        shown.with_columns(pl.col("measure").replace({name: one.title for name, one in MEASURES.items()})).select(
            "measure", "first_worst", "worst", "label", "near", "median", "threshold", "over", "layers", "checkpoint"
        ),
        key="timeline-last", alt="Every measure at the last checkpoint",
        columns={
            "measure": Column("measure", "text", width=180), "label": Column("layer", "text", width=56),
            "first_worst": Column("worst, first", "figure"),
            "worst": Column("worst, last", "figure"),
            "near": Column("90th percentile", "figure", "towards the worst", width=110),
            "median": Column("median", "figure"), "threshold": Column("threshold", "figure"),
            "over": Column("layers over", "count"), "layers": Column("of", "count", width=44),
            "checkpoint": Column("last checkpoint", "text"),
        },
        read="The worst layer at the first and at the last checkpoint. A row shows that layer. Empty threshold: it has "
        "none, or one of its own per layer.",
    )  # fmt: skip


def _probability(run: Run, found: exhibits.Checkpoints) -> None:
    paths = {Path(path).stem: Path(path) for path in found.paths}
    at = state.choose("Load against probability at", list(paths), key="at", default=list(paths)[-1])
    layer = focus.current().layer_in(run)
    compare_chart(exhibits.load_and_probability, data.open_run(paths[at]), key="timeline-f-p", layer=layer)
