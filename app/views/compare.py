"""Compare: the same tokens in two runs: how far do they agree, where not, and what does that move?"""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, header
from app.components.page import render
from app.figures import comparison as figures
from app.figures.style import safe
from app.frames import comparison as frames
from app.frames.axes import layer_labels
from moescope.errors import InputError
from store import Entry, Run

_PAIRS = {"token ids": "by their tokens", "position": "by number and length"}
_READ = {
    "boundary_margin": "Small margins are ties that rounding can decide. Tokens that flip at large ones saw another "
    "input, or another router.",
    "left_weight": "How much of the output of these tokens came from experts that the other run does not use.",
    "weight_gap": "Near 0 the expert that came weighs what the one that left did: a tie. Far from 0 the router changed "
    "its mind.",
}


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Compare", run, what="The same tokens in two runs: where do they use other experts, and what moves?")
    if run.live:
        st.info("Runs are compared when the collection has ended.", icon=":material/hourglass_top:")
        return
    if header.omitted("Agreement with another run", run, "trace", "order"):
        return
    others = {name: entry for name, entry in data.entries().items() if name != run.name and not entry.live}
    if not others:
        st.info(
            "The store has no other finished run to compare this one with. Profile the same texts with another "
            "checkpoint, precision or quantisation of the model.",
            icon=":material/compare_arrows:",
        )
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        name = state.choose("With", sorted(others), key="other", help="the second run; the first is in the sidebar")
        pairs = state.choose(
            "Sequences paired", list(_PAIRS), key="pairs", words=_PAIRS.__getitem__, segmented=True,
            help="By number and length where a run keeps no token ids; you vouch for the texts being the same.",
        )  # fmt: skip
    found = _compared(run, others[name], by_position=pairs == "position")
    if found is not None:
        _doubts(data.open_run(others[name].path))
        _draw(run, found)


def _compared(run: Run, entry: Entry, *, by_position: bool) -> frames.Tables | None:
    """The frames, or the reason why there are none."""
    with st.spinner("Comparing the two runs, token by token"):
        try:
            return data.frames_of_two(frames.tables, run, data.open_run(entry.path), by_position=by_position)
        except InputError as error:
            st.info(f"These cannot be compared: {state.plain(str(error), 400)}", icon=":material/compare_arrows:")
            return None


def _doubts(other: Run) -> None:
    """The verdict on the second run's capture where it is no good one; that of the first stands in the title."""
    if other.badge.status in ("invalid", "warning"):
        words = f"The capture of {state.code(other.name)} is doubtful: {state.plain(other.badge.reason, 300)}"
        st.warning(words)


def _draw(run: Run, found: frames.Tables) -> None:
    rests_on = _alignment(found["alignment"])
    _agreement(found, rests_on)
    _flips(run, found["margins"])
    _load(found)
    _tokens(found["changed"])


def _alignment(frame: pl.DataFrame) -> str:
    """What was compared, as a sentence; also for the captions."""
    first, second = frame.iter_rows(named=True)
    words = f"{first['compared']:,} sequences, {first['tokens']:,} tokens"
    left = [row for row in (first, second) if row["left_out"]]
    without = "; ".join(
        f"{row['left_out']:,} of {row['sequences']:,} sequences of {state.code(row['run'])}" for row in left
    )
    st.caption(f"Compared: {words}." + (f" Without partner, and left out: {without}." if left else ""))
    return f"{words}; bands: 95 %, sequences drawn anew."


def _agreement(found: frames.Tables, rests_on: str) -> None:
    frame, layers = found["agreement"], found["layers"]
    (shared,) = frame.filter(measure="overlap").iter_rows(named=True)
    with st.container(horizontal=True, gap="small"):
        for measure, words in figures.MEASURES.items():
            (row,) = frame.filter(measure=measure).iter_rows(named=True)
            band = f"95 %: {row['low']:.2%} to {row['high']:.2%}. " if row["low"] is not None else ""
            known = row["chance"] is not None
            chance = f"Random: {row['chance']:.1%}; shuffled tokens: {row['popularity']:.1%}." if known else ""
            st.metric(words.capitalize(), f"{row['value']:.2%}", help=band + chance, border=True)
    chart.show(
        figures.agreement_curves(layers, theme=state.theme()),
        layers,
        key="compare-agreement",
        read="The share of a token's experts that both runs use, of tokens with the same set, and with the same first "
        f"choice. Random selections have {shared['chance']:.1%} in common, and shuffled tokens, which share what is "
        f"popular, {shared['popularity']:.1%}.",
        rests_on=rests_on,
        alt="Curves over the layers: experts in common, same set, same first choice, and their baselines",
    )
    if len(found["domains"]) > 1:
        with st.expander("Agreement by domain", icon=":material/table:"):
            percent = st.column_config.NumberColumn(format="percent")
            columns = [name for name in found["domains"].columns if name not in ("domain", "token_layers")]
            st.dataframe(
                found["domains"], hide_index=True, alt="Agreement of the two runs by domain",
                column_config=dict.fromkeys(columns, percent),
            )  # fmt: skip


def _flips(run: Run, frame: pl.DataFrame) -> None:
    st.subheader("How close were the tokens that flip?", anchor=False)
    known = [name for name in figures.MARGINS if name in frame["margin"].unique().to_list()]
    if not known:
        st.write("No token flips, or neither run holds gate weights that would tell how close it was.")
        return
    label = state.choose(
        "Layer", [state.ALL, *layer_labels(run)], key="flips", words=lambda one: "all layers" if one == "all" else one
    )
    where = "all layers" if label == state.ALL else f"layer {safe(label)}"
    with chart.pair():
        for name in known:
            shown = frame.filter(margin=name, label=label)
            chart.show(
                figures.margin_bars(shown, margin=name, where=where, theme=state.theme()),
                shown,
                key=f"compare-{name}-{label}",
                read=_READ[name],
                rests_on=f"{shown['flipped'].sum():,} tokens that flip.",
                alt=f"Bars: {figures.MARGINS[name][0]}, of tokens whose set of experts differs",
            )
    if "boundary_margin" not in known:
        st.caption("With `--router-scores` in the first run, margins between logits tell tokens that flip from others.")


def _load(found: frames.Tables) -> None:
    st.subheader("What does it move?", anchor=False)
    chart.show(
        figures.load_difference_map(found["load"], theme=state.theme()),
        found["load"],
        key="compare-load",
        read="Blue experts take more of the layer's selections in the second run, orange ones less.",
        rests_on=f"{found['load']['selections'].sum():,} selections in the first run.",
        alt="Map of layers and experts: load in the second run minus the first",
    )
    chart.show(
        figures.load_curve(found["layers"], theme=state.theme()),
        found["layers"],
        key="compare-load-moved",
        read="Total variation of the two loads. Where it lies far below the selections changed, flips cancel out: the "
        "load stays, though single tokens go elsewhere.",
        rests_on="Band: 95 %, jackknife over sequences.",
        alt="Curve over the layers: share of the selections that moves to other experts",
    )


def _tokens(frame: pl.DataFrame) -> None:
    st.subheader("Tokens that agree least", anchor=False)
    if frame.is_empty():
        st.write(f"No token id is known to occur at least {frames.MIN_OCCURRENCES} times in what is compared.")
        return
    number = st.column_config.NumberColumn
    with st.container(border=True, gap="xsmall"):
        st.dataframe(
            frame, hide_index=True, height=320, alt="Token ids with the lowest agreement between the two runs",
            column_config={
                "token_id": number("id"),
                "occurrences": number(format="localized"),
                "overlap": number("experts in common", format="percent"),
                "exact": number("same set", format="percent"),
            },
        )  # fmt: skip
        chart.caption(
            f"Ids with at least {frames.MIN_OCCURRENCES} occurrences, over all layers. Spaces are shown as ␣, line "
            "ends as ⏎, parts of a character as bytes.",
            frame, None, key="compare-tokens",
        )  # fmt: skip


if __name__ == "__main__":
    render(page)
