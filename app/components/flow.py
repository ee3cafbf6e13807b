"""The section Flow of the page Routing: experts that meet, experts that follow, and what can be foreseen."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, header
from app.figures import flow as figures
from app.figures.style import safe
from app.frames import flow as frames
from app.frames.axes import layer_labels, most
from profiler.headline.flow import MOST_EXPERTS
from profiler.metrics.transitions import EXTRA
from store import Run

LEAST_EXPECTED = 10
"""Pairs that popularity alone would give fewer tokens stand in no table: their ratios are noise."""

_READ = {
    "attraction": "Blue pairs meet more often than their popularity explains, orange ones avoid each other. 1 is "
    "chance.",
    "co_activation": "Of the tokens of the row's expert, how many use the column's too. A dark column is popular with "
    "all.",
    "lift": "Against independent experts. A token's experts differ, so a random router stands below 1.",
    "jaccard": "Dark pairs are nearly one expert: where one is used, so is the other.",
    "pointwise_information": "The lift as bits. A random router stands below 0.",
}


def section(run: Run, *, domain: str | None, phase: str | None) -> None:
    """Draw the section."""
    if not run.layers:  # a live run before its first shard
        return
    st.subheader("Which experts meet?", anchor=False)
    if header.omitted("Which experts meet, and which follow", run, *_lacks_pairs(run)):
        return
    if any(layer.num_experts > MOST_EXPERTS for layer in run.layers):
        st.info(
            f"Pairs are counted in layers of at most {MOST_EXPERTS:,} experts; this model has more: a table of all "
            "pairs would be larger than the trace.",
            icon=":material/grid_off:",
        )
        return
    labels = layer_labels(run)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        label = focus.current().layer or labels[min(1, len(labels) - 1)]
        measure = state.choose("Pairs by", list(frames.MEASURES), key="pairs", words=frames.MEASURES.__getitem__)
    if phase:
        st.caption("Pairs, and what follows, are counted over both phases.")
    _pairs(run, label=label, measure=measure, domain=domain)
    if run.live:
        header.not_yet("What follows, and what can be foreseen,", run)
        return
    _transitions(run, label=label, domain=domain)
    if len(labels) > 1:
        _foreseen(run, label=label, domain=domain, phase=phase)


def _lacks_pairs(run: Run) -> tuple[str, ...]:
    return () if run.has_trace or run.live or len(data.frame(frames.co_activations, run)) else ("trace",)


def _pairs(run: Run, *, label: str, measure: str, domain: str | None) -> None:
    frame = data.frame(frames.pairs, run, label=label, domain=domain)
    if not frame["joint_tokens"].sum():
        st.write(f"No token of this choice uses two experts of layer {label}: there are no pairs.")
        return
    over = data.frame(frames.co_activations, run)
    with chart.pair():
        chart.show(
            figures.pair_map(
                frame,
                measure=measure,
                title=f"{_title(frames.MEASURES[measure])}, layer {safe(label)}",
                theme=state.theme(),
            ),
            frame,
            key=f"pairs-{measure}-{label}",
            read=_READ[measure] + " Experts that attract each other stand together.",
            rests_on=_text(frame, domain),
            alt=f"Map of experts by experts: {frames.MEASURES[measure]}",
        )
        chart.show(
            figures.excess_curve(over, theme=state.theme()),
            over,
            key="pair-excess",
            read="How many pairs would have to be others if popularity alone decided who meets. Near the dotted line, "
            "experts are used independently.",
            rests_on="All text; intervals leave out each sixteenth of the sequences.",
            alt="Curve over the layers: share of pairs beyond popularity, with what noise gives",
        )
    _strongest(frame, label=label)


def _strongest(frame: pl.DataFrame, *, label: str) -> None:
    once = frame.filter((pl.col("expert") < pl.col("other")) & (pl.col("expected") >= LEAST_EXPECTED))
    if once.is_empty():
        return
    best = once.sort("attraction", descending=True).head(50).drop("place", "other_place", "tokens")
    number = st.column_config.NumberColumn
    with st.expander(f"Pairs of layer {label} that attract each other most", icon=":material/join_inner:"):
        st.dataframe(
            best,
            hide_index=True,
            alt="Pairs of experts by attraction",
            column_config={
                "joint_tokens": number("joint tokens", help="tokens that use both"),
                "expected": number("by popularity", format="%.0f"),
                **{name: number(words, format="%.3f") for name, words in frames.MEASURES.items()},
            },
        )


def _transitions(run: Run, *, label: str, domain: str | None) -> None:
    st.subheader("Which experts follow?", anchor=False)
    earlier = frames.sources(run, label)
    if not earlier:
        st.write(f"Layer {label} is the first MoE layer: nothing comes before it. Choose a later one.")
        return
    if header.omitted("Which experts follow", run, "trace"):
        return
    source = state.choose("From layer", earlier, key="from", default=earlier[0])
    frame = data.frame(frames.transitions, run, label=label, source=source, domain=domain)
    bits = data.frame(frames.information, run)
    with chart.pair():
        chart.show(
            figures.pair_map(
                frame, measure="lift", title=f"From layer {safe(source)} to layer {safe(label)}", square=False,
                x=f"expert of layer {safe(label)}", y=f"expert of layer {safe(source)}", theme=state.theme(),
            ),
            frame,
            key=f"transitions-{source}-{label}",
            read="Blue: tokens of the row's expert go on to the column's more often than its popularity explains. "
            "Columns stand so that partners face each other: a blue diagonal is a path through both layers.",
            rests_on=_text(frame, domain),
            alt=f"Map of experts of layer {source} by experts of layer {label}: lift",
        )  # fmt: skip
        chart.show(
            figures.information_curve(bits, theme=state.theme()),
            bits,
            key="transition-information",
            read="Bits that one expert of a token says about one of the next layer. With experts of another token "
            "of the same text only the topic is left; with those of any token, what the estimate gives of nothing.",
            rests_on=_sampled(bits),
            alt="Curves over the layers: mutual information of neighbouring layers, with controls",
        )


def _foreseen(run: Run, *, label: str, domain: str | None, phase: str | None) -> None:
    st.subheader("Can the next experts be foreseen?", anchor=False)
    early = data.frame(frames.lookaheads, run, domain=domain, phase=phase)
    held_out = data.frame(frames.predictability, run)
    fitted = held_out.filter(pl.col("predictor") == "transition")
    if fitted.is_empty():
        header.not_yet("How far experts can be foreseen", run)
    both = _together(held_out, early)
    if len(fitted) or len(early):
        st.markdown(sentence(held_out, early))
        words = {str(extra): "k experts" if not extra else f"k + {extra} experts" for extra in range(EXTRA + 1)}
        extra = int(state.choose("Fetched", list(words), key="fetched", words=words.__getitem__))
        chart.show(
            figures.recall_curves(both, extra=extra, theme=state.theme()),
            both,
            key=f"foreseen-{extra}",
            read="The part of each layer's choices that is in memory in time if so many experts are fetched while the "
            "layer before still computes. What lies above popularity is gained by looking.",
            rests_on=f"Fitted on one half of the sequences, tried on the other; all text. {_sampled(fitted)}"
            + (f" Early routers: {_where(domain, phase)}, counted, not fitted: no interval." if len(early) else ""),
            alt="Curves over the layers: share of choices foreseen by transitions, popularity, early routers, chance",
        )
        chart.show(
            figures.width_curves(both, label=label, theme=state.theme()),
            both.filter(pl.col("label") == label),
            key=f"widths-{label}",
            read="What fetching more experts buys, and what looking further ahead costs: solid lines look one layer "
            "ahead, dashed ones two, dotted ones three.",
            alt=f"Curves over experts fetched: share of the choices of layer {label} foreseen",
        )
    if early.is_empty():
        header.needs_level("What routers foresee when they are run early", "lookahead", run)
    else:
        _early(early)


def _early(early: pl.DataFrame) -> None:
    number = st.column_config.NumberColumn
    table = early.filter(pl.col("extra") == 0).drop("layer", "step", "extra", "fetched")
    with st.expander("Early routers as a table", icon=":material/table:"):
        st.dataframe(
            table,
            hide_index=True,
            alt="Recall, whole choices, first choices and cosine of routers that were run early",
            column_config={
                "label": st.column_config.TextColumn("layer"),
                "distance": number("layers ahead"),
                "value": number("recall", format="percent"),
                "exact": number("whole choices", format="percent"),
                "chance": number("recall by chance", format="percent"),
                "first_choice": number("first choices", format="percent"),
                "cosine": number("cosine of the inputs", format="%.3f"),
                "tokens": number("tokens", format="localized"),
            },
        )
        st.caption("k experts fetched; first positions are left out. Sums of all sequences: there is no interval.")


def sentence(held_out: pl.DataFrame, early: pl.DataFrame) -> str:
    """What k fetched experts hold of the next layer's choices, in one sentence: by transitions, popularity, routers."""
    overall = held_out.filter((pl.col("label") == "all") & (pl.col("extra") == 0) & (pl.col("control") == "observed"))
    parts = [f"**{row['value']:.1%}** {_range(row)} by {_BY[row['predictor']]}" for row in overall.to_dicts()[::-1]]
    near = early.filter((pl.col("distance") == 1) & (pl.col("extra") == 0))
    parts += [
        f"**{mean:.1%}** by {_BY[name]}"
        for name, mean in near.group_by("input", maintain_order=True).agg(pl.col("value").mean()).sort("input").rows()
    ]
    if len(overall):
        parts.append(f"{overall['chance'][0]:.1%} by chance")
    return "Of the next layer's choices, k fetched experts hold " + ", ".join(parts) + "."


_BY = {
    "transition": "the experts of the layer before",
    "popularity": "popularity alone",
    "router": "its router run early",
    "residual": "its router run early through its own norm",
}


def _together(held_out: pl.DataFrame, early: pl.DataFrame) -> pl.DataFrame:
    """Transitions, popularity and early routers as rows of one frame."""
    routers = early.rename({"input": "predictor"}).with_columns(
        pl.lit("observed").alias("control"), *(pl.lit(None, pl.Float64).alias(name) for name in ("low", "high"))
    )
    columns = [name for name in held_out.columns if name in routers.columns]
    return pl.concat([held_out.select(columns), routers.select(columns)], how="vertical_relaxed")


def _range(row: dict[str, float | None]) -> str:
    return "" if row["low"] is None else f"({row['low']:.1%} to {row['high']:.1%})"


def _sampled(frame: pl.DataFrame) -> str:
    if frame.is_empty():
        return ""
    tokens, sequences = most(frame["tokens"]), most(frame["sequences"])
    return f"{tokens:,.0f} tokens of {sequences:,.0f} sequences; 95 % intervals over sequences."


def _where(domain: str | None, phase: str | None) -> str:
    return ", ".join(state.plain(part) for part in (domain, phase) if part) or "all text"


def _text(frame: pl.DataFrame, domain: str | None) -> str:
    return f"{most(frame['tokens']):,.0f} tokens{f' of {state.plain(domain)}' if domain else ''}."


def _title(text: str) -> str:
    return text[0].upper() + text[1:]
