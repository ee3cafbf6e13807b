"""Compare: the same tokens in two runs: how far do they agree, where not, and what does that move? And checkpoints."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, header, table
from app.components.compare_chart import compare_chart
from app.components.compare_header import compare_header
from app.components.compare_text import compare_text
from app.components.compare_timeline import compare_timeline
from app.components.page import render
from app.components.sections import sections
from app.components.table import Column
from app.exhibits import comparison as exhibits
from app.exhibits.comparison import Second
from app.exhibits.exhibit import Absent
from app.figures.comparison import MARGINS, MEASURES
from app.frames import comparison as frames
from app.frames import comparison_made
from app.frames.comparison_tokens import MIN_OCCURRENCES
from moescope.errors import MoescopeError
from store import Run

_PAIRS = {"token ids": "by their tokens", "position": "by number and length"}


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Compare", run, what="The same tokens in two runs: where do they use other experts, and what moves?")
    if run.live:
        st.info("Runs are compared when the collection has ended.", icon=":material/hourglass_top:")
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
    try:
        other = data.open_run(others[name].path)
    except MoescopeError as error:
        st.warning(
            f"{state.code(name)} cannot be read: {state.plain(str(error), 300)} Choose another run to compare with."
        )
        return
    there = exhibits.second(run, data.frame, str(others[name].path))
    compare_header(run, other, there)
    by_position = pairs == "position"
    sections(
        {
            "Agreement": lambda: _agreement(run, there, by_position),
            "Flips": lambda: _flips(run, there, by_position),
            "Load": lambda: _load(run, there, by_position),
            "Text": lambda: _text(run, there, by_position),
            "Timeline": lambda: compare_timeline(run, others),
        }
    )


def _compared(run: Run, there: Second, by_position: bool) -> frames.Tables | None:
    """The frames, or the reason why there are none."""
    try:
        with st.spinner("Comparing the two runs, token by token"):
            return exhibits.compared(run, data.frame, there, by_position=by_position)
    except Absent as missing:
        chart.absent(missing)
        return None


def _agreement(run: Run, there: Second, by_position: bool) -> None:
    found = _compared(run, there, by_position)
    if found is None:
        st.markdown("What can still be compared: how even the load of each is, and what was measured of the two.")
        compare_chart(exhibits.load_evenness, run, key="compare-evenness", other=str(there.path))
        _measured(run, there)
        return
    _alignment(found["alignment"])
    _overall(found["agreement"])
    compare_chart(
        exhibits.agreement, run, key="compare-agreement", other=str(there.path), by_position=by_position
    )  # fmt: skip
    if len(found["domains"]) > 1:
        shares = {measure: Column(words, "share") for measure, words in MEASURES.items()}
        ends = tuple(name for name in found["domains"].columns if name.endswith(("_low", "_high")))
        table.show(
            found["domains"], key="compare-domains", hide=("jaccard", *ends), alt="Agreement of the two runs by domain",
            columns={**shares, "token_layers": Column("tokens × layers", "count")},
            read="Agreement by domain, over all layers. Intervals are in the download.",
        )  # fmt: skip
    _measured(run, there)


def _alignment(frame: pl.DataFrame) -> None:
    """What was compared, and what has no partner."""
    first, second = frame.iter_rows(named=True)
    left = [row for row in (first, second) if row["left_out"]]
    without = "; ".join(
        f"{row['left_out']:,} of {row['sequences']:,} sequences of {state.code(row['run'])}" for row in left
    )
    words = f"Compared: {first['compared']:,} sequences, {first['tokens']:,} tokens."
    if first["of_tokens"]:
        words += f" That is a part of the {first['of_tokens']:,} that both have; `moescope compare` takes all of them."
    st.caption(words + (f" Without partner, and left out: {without}." if left else ""))


def _overall(frame: pl.DataFrame) -> None:
    with st.container(horizontal=True, gap="small"):
        for measure, words in MEASURES.items():
            (row,) = frame.filter(measure=measure).iter_rows(named=True)
            band = f"95 %: {row['low']:.2%} to {row['high']:.2%}. " if row["low"] is not None else ""
            known = row["chance"] is not None and row["popularity"] is not None
            chance = f"Random: {row['chance']:.1%}; shuffled tokens: {row['popularity']:.1%}." if known else ""
            st.metric(words.capitalize(), f"{row['value']:.2%}", help=band + chance or None, border=True)


def _measured(run: Run, there: Second) -> None:
    """Quality figures of the two models, where an evaluation is beside one of the runs."""
    frame = comparison_made.measured(run, data.open_run(there.path))
    if frame.is_empty():
        st.caption(
            "No evaluation of the one model against the other lies beside these runs; `moescope evaluate MODEL "
            "--against BASE --data PATH --beside RUN` measures what the flips cost."
        )
        return
    table.show(
        frame, key="compare-measured", alt="What was measured of the two models",
        columns={
            "figure": Column("measured", "text"), "model": Column("model", "text"),
            "base": Column("against", "text"), "held_out": Column("held-out text"),
        },
        read="From `moescope evaluate`: what the differences in routing, and all else that changed, cost in quality.",
    )  # fmt: skip


def _flips(run: Run, there: Second, by_position: bool) -> None:
    found = _compared(run, there, by_position)
    if found is None:
        return
    known = [name for name in MARGINS if name in found["margins"]["margin"].unique().to_list()]
    label = focus.current().layer
    layer = label if label in found["layers"]["label"].to_list() else None
    if not known:
        st.write("No token flips, or neither run holds gate weights that would tell how close it was.")
    with chart.pair():
        for name in known:
            compare_chart(
                exhibits.margins, run, key=f"compare-{name}", other=str(there.path), by_position=by_position,
                margin=name, layer=layer,
            )  # fmt: skip
        _changed(found["changed"])
    if known and "boundary_margin" not in known:
        st.caption("With `--router-scores` in the first run, margins between logits tell tokens that flip from others.")


def _changed(frame: pl.DataFrame) -> None:
    if frame.is_empty():
        st.write(f"No token id is known to occur at least {MIN_OCCURRENCES} times in what is compared.")
        return
    table.show(
        frame, key="compare-tokens", alt="Token ids with the lowest agreement between the two runs",
        columns={"text": Column("token", "text"), "overlap": Column("experts in common", "share"),
                 "exact": Column("same set", "share")},
        read=f"Token ids that agree least, of those with at least {MIN_OCCURRENCES} occurrences, over all layers. "
        "Spaces are shown as ␣, line ends as ⏎, parts of a character as bytes.",
    )  # fmt: skip


def _load(run: Run, there: Second, by_position: bool) -> None:
    other = {"other": str(there.path)}
    if _compared(run, there, by_position) is not None:
        compare_chart(exhibits.load_pair, run, key="compare-load-both", by_position=by_position, **other)
        compare_chart(exhibits.load_difference, run, key="compare-load", by_position=by_position, **other)
        with chart.pair():
            compare_chart(exhibits.load_moved, run, key="compare-load-moved", by_position=by_position, **other)
            _ranks(run, there)
    else:
        _ranks(run, there)
    compare_chart(exhibits.load_evenness, run, key="compare-evenness", **other)


def _ranks(run: Run, there: Second) -> None:
    compare_chart(
        exhibits.load_ranks, run, key="compare-ranks", other=str(there.path), layer=focus.current().layer_in(run)
    )  # fmt: skip


def _text(run: Run, there: Second, by_position: bool) -> None:
    found = _compared(run, there, by_position)
    if found is not None:
        compare_text(run, there, found)


if __name__ == "__main__":
    render(page)
