"""Expert: what one expert is for: its domains, its tokens, its neighbours, and what would be lost with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, expert_errors, expert_text, header, table
from app.components.expert_picks import expert_picks
from app.components.page import render
from app.components.sections import sections
from app.components.table import Column
from app.exhibits import expert as exhibits
from app.exhibits.absent import needs_level, require
from app.exhibits.exhibit import Absent
from app.frames import expert as frames
from app.frames import expert_cache
from app.frames.similarity import kinds
from store import Run

# Columns of kinds of similarity that fit beside the chosen one.
MOST_KINDS = 5


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Expert", run, what="What is one expert for: which text does it take, and who is like it?")
    if not run.layers:
        st.info("No layer has been recorded yet.", icon=":material/hourglass_top:")
        return
    where = {"label": focus.current().layer_in(run), "expert": focus.current().expert_in(run)}
    expert_picks(run, where)
    drawers = {
        "Summary": _summary, "Tokens": expert_text.section, "Neighbours": _neighbours, "Importance": _importance,
        "Fewer bits": expert_errors.section, "Cache": _cache,
    }  # fmt: skip
    sections({name: partial(draw, run, where) for name, draw in drawers.items()})


def _key(name: str, where: dict[str, Any]) -> str:
    return f"expert-{name}-{where['label']}-{where['expert']}"


def _choices(where: dict[str, Any]) -> dict[str, Any]:
    return {"layer": where["label"], "expert": where["expert"]}


def _summary(run: Run, where: dict[str, Any]) -> None:
    frame = data.frame(frames.figures, run, **where)
    if frame.is_empty():
        st.info("Nothing has been counted in this layer yet.", icon=":material/hourglass_top:")
        return
    chart.exhibit(exhibits.domains, run, key=_key("domains", where), **_choices(where))
    table.show(
        frame,
        key=_key("figures", where),
        alt="Key figures of the expert beside the mean of its layer",
        read="From and to: 95 % interval, where one was computed. By chance: what an even router gives every expert, "
        "or the mean of the layer when the labels or tokens of the text are shuffled (docs/metrics.md).",
        columns={
            "value": Column("this expert", "exact"),
            "beside": Column("mean of the layer", "exact"),
            "chance": Column("by chance", "exact", "an even router, or the text with its order shuffled"),
            "low": Column("from", "exact", "lower end of the 95 % interval"),
            "high": Column("to", "exact", "upper end of the 95 % interval"),
        },
    )
    _outlier(run, where)


def _neighbours(run: Run, where: dict[str, Any]) -> None:
    frame = data.frame(frames.partners, run, **where)
    titles = dict(data.frame(kinds, run).select("kind", "title").iter_rows())
    alike = [name for name in titles if name in frame.columns]
    if frame.is_empty() or len(frame.columns) < 2:
        try:
            require("Which experts are used together or alike", run, "trace", "outputs")
            st.write("This run says nothing of which experts are used together or alike.")
        except Absent as missing:
            chart.absent(missing)
        return
    order = [name for name in ("lift", *alike) if name in frame.columns]
    words = {"lift": "used together", **titles}
    by = state.choose("Nearest by", order, key="near", words=words.__getitem__)
    shown = frame.sort(by, descending=True, nulls_last=True)
    together = [name for name in ("joint_tokens", "given", "lift") if name in frame.columns]
    first = together if by == "lift" else [by, *together]
    rest = [name for name in alike if name not in first]
    table.show(
        shown.select(pl.lit(where["label"]).alias("label"), pl.col("other").alias("expert"), *first, *rest),
        key=_key(f"neighbours-{by}", where),
        alt="The other experts of the layer, nearest first",
        read="Used together says which experts share tokens, alike which could stand in for each other: alike experts "
        "that are never used together are rivals for the same tokens. All kinds are in the download. A row picks that "
        "expert; the page Similarity has all pairs.",
        hide=("label", *rest[MOST_KINDS:]),
        columns={name: Column(titles[name], "number") for name in alike}
        | {
            "expert": Column("expert", "text", width=62),
            "joint_tokens": Column("joint tokens", "count"),
            "given": Column("together", "share", "of this expert's tokens, those that use the other too"),
            "lift": Column("lift", "number", "together over what the other's popularity gives; 1 = by chance"),
        },
    )


def _importance(run: Run, where: dict[str, Any]) -> None:
    _outlier(run, where)
    chart.exhibit(exhibits.importance, run, key=_key("importance", where), **_choices(where))
    expert_errors.scores(frames.of_expert(data.frame(frames.importance, run), **where), key=_key("scores", where))
    ablated = data.frame(frames.ablations, run, **where)
    if not ablated.is_empty():
        st.markdown("**It was switched off, alone or with others:**")
        table.show(
            ablated,
            key=_key("ablations", where),
            alt="Passes of the ablations with this expert among the chosen ones",
            read="The page Super experts shows them.",
            columns={"what": Column("pass", "text"), "sink_decay": Column("sink decay", "share")},
        )


def _outlier(run: Run, where: dict[str, Any]) -> None:
    frame = data.frame(frames.outliers, run, **where)
    if frame.is_empty():
        if not run.live and "activations" not in run.info.levels:
            _absent_outputs(run)
        return
    row = frame.row(0, named=True)
    rules = [name for name, rule in (("the paper's rule", "paper"), ("its code's rule", "code")) if row[rule]]
    verdict = f"a super expert by {' and '.join(rules)}" if rules else "no super expert"
    with st.container(horizontal=True, wrap=False, gap="small", vertical_alignment="center"):
        st.markdown(
            f"Largest output {row['value']:,.3g}: rank {row['layer_rank']} of {row['of_layer']} in the layer, "
            f"{row['rank']:,} of {row['of']:,} in the model; it is **{verdict}**. It stood in channel "
            f"{row['channel']}, at position {row['position']} of sequence {row['sequence']}.",
            width="stretch",
        )
        if row["sequence"] is not None and run.has_trace:
            expert_text.to_tokens("Read it there", row["sequence"], row["position"])


def _absent_outputs(run: Run) -> None:
    try:
        raise needs_level("What the expert puts out", "activations", run)
    except Absent as missing:
        chart.absent(missing)


def _cache(run: Run, where: dict[str, Any]) -> None:
    """How a cache of experts would see it."""
    if run.has_trace and not {"trace", "order"} & set(run.omissions):
        runs = data.frame(expert_cache.bursts, run, **where)
        if len(runs):
            row = runs.row(0, named=True)
            alone = f"; {row['shuffled']:.2f} if its uses were spread at random" if row["shuffled"] else ""
            st.markdown(
                f"It is used on **{row['mean']:.2f} tokens in a row** on average{alone}. Longest run: "
                f"{row['longest']:,} tokens, of {row['bursts']:,} runs."
            )
    with chart.pair():
        chart.exhibit(exhibits.hit_rate, run, key=_key("hit-rate", where), **_choices(where))
        chart.exhibit(exhibits.reuse, run, key=_key("reuse", where), **_choices(where))
    chart.exhibit(exhibits.consistency, run, key=_key("consistency", where), **_choices(where))


if __name__ == "__main__":
    render(page)
