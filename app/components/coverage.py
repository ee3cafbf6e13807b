"""The section "Is the text enough?" of the Overview: convergence of rankings, tokens to collect, scores compared."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, state
from app.components import chart, header
from app.figures import coverage as figures
from app.figures import similarity as similarity_figures
from app.frames import coverage as frames
from planner.importance import find
from store import Run

_PREFERRED = ("reap", "gate_mass", "frequency")


def section(run: Run) -> None:
    """Draw the section."""
    st.subheader("Is the text enough?", anchor=False)
    if run.live:
        header.not_yet("Whether the text is enough", run)
        return
    needed = data.frame(frames.needed, run)
    if needed.is_empty():
        _nothing(run)
    else:
        _convergence(run, needed)
    _scores(run)


def _convergence(run: Run, needed: pl.DataFrame) -> None:
    scores = needed["score"].unique(maintain_order=True).to_list()
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        default = next(name for name in _PREFERRED if name in scores)
        score = state.choose("Experts ranked by", scores, key="score", default=default, words=_words)
        goal = state.choose("Two texts should agree on", list(frames.GOALS), key="goal", words=frames.GOALS.__getitem__)
    row = needed.filter((pl.col("score") == score) & (pl.col("goal") == goal)).row(0, named=True)
    st.markdown(f"**{sentence(row)}**")
    curve = data.frame(frames.convergence, run).filter((pl.col("score") == score) & (pl.col("goal") == goal))
    chart.show(
        figures.convergence_curve(
            curve, title=f"Agreement of two texts, experts ranked by {_words(score)}", tokens=row["tokens"],
            target=row["target"], theme=state.theme(),
        ),
        curve,
        key=f"convergence-{score}-{goal}",
        read="Two texts of the same kind would agree this far on which experts to keep. Below the target, a plan "
        "made on this text is partly made of its accidents. The dashed line carries the agreement of halves on to "
        "longer texts; where it leaves the measured points, do not trust it beyond them.",
        rests_on=f"Mean over {len(run.layers)} layers of 100 random choices of disjoint parts, sixteenths of the text: "
        + _length(run),
        alt="Curve: agreement of two texts over their length, with target and chance",
    )  # fmt: skip
    _table(needed)


def sentence(row: dict[str, object]) -> str:
    """One sentence: what two texts as long as this one would agree on, and how much more is needed."""
    what = f"{_words(str(row['score']))}, {frames.GOALS[str(row['goal'])]}"
    if row["verdict"] == "no better than chance":
        return f"Ranked by {what}: halves of this text agree no more than random rankings do. Do not cut by it yet."
    expected = (
        f"two texts as long as this one are expected to agree {row['whole']:.2f}; {row['target']:.2f} is asked for"
    )
    if row["verdict"] == "enough":
        return f"Ranked by {what}: enough. By its halves, {expected}."
    return f"Ranked by {what}: {row['verdict']} tokens. By its halves, {expected}."


def _length(run: Run) -> str:
    """What the figures rest on, with a full stop."""
    sequences = f" in {run.info.sequences:,} sequences" if run.info.sequences else ""
    return f"{run.info.tokens:,} tokens{sequences}."


def _words(score: str) -> str:
    return frames.SCORES.get(score, score)


def _table(needed: pl.DataFrame) -> None:
    with st.container(border=True, gap="xsmall"):
        number = st.column_config.NumberColumn
        st.dataframe(
            needed.with_columns(pl.col("score").replace(frames.SCORES)).select(
                "score", "goal", "verdict", "needed", "whole", "target", "half", "low", "high", "chance_high"
            ),
            hide_index=True,
            alt="Table: per score and goal, agreement of halves, expected agreement and tokens needed",
            column_config={
                "half": number("halves agree", format="%.3f"),
                "low": number("from", format="%.3f", help="95 % of random choices of halves"),
                "high": number("to", format="%.3f"),
                "chance_high": number("chance, at most", format="%.3f", help="97.5 % of random rankings stay below"),
                "whole": number("whole, expected", format="%.3f", help="Spearman-Brown, from the halves"),
                "target": number("asked for", format="%.3f"),
                "needed": number("tokens needed", format="compact"),
            },
        )
        chart.caption(
            "A score that needs little text is not a better one: it is a surer one. Cuts are counted as the part of "
            "the lowest experts that both texts would take.",
            needed, None, key="coverage-needed",
        )  # fmt: skip


def _scores(run: Run) -> None:
    frame = data.frame(frames.agreement, run).filter(pl.col("layer").is_null())
    with st.expander("Do the importance scores agree with each other?", icon=":material/balance:"):
        if frame.is_empty():
            st.write("This run can give one score only: there is nothing to compare it with.")
            return
        titles = {name: find(name).title for name in dict.fromkeys([*frame["first"], *frame["second"]])}
        chart.show(
            similarity_figures.agreement_map(
                frame, titles, title="Agreement of scores, mean over the layers", theme=state.theme(),
                beside=("overlap_25", "cut alike, lowest quarter", "random rankings"),
            ),
            frame,
            key="score-agreement",
            read="Blue: both scores rank the experts alike, so the cheaper one will do. In brackets: no more alike "
            "than random rankings. Where scores differ, only damage measured after a cut can say which is right.",
            rests_on=f"{frame['experts'][0]:,} experts, {_length(run)}",
            alt="Map of importance scores by importance scores: rank correlation",
        )  # fmt: skip


def _nothing(run: Run) -> None:
    if header.omitted("Whether two texts would rank the experts alike", run, "order"):
        return
    if run.info.sequences < 2 and run.has_trace:
        st.write("The run holds a single sequence: it cannot be halved.")
    else:
        header.not_yet("Whether the text is enough", run)
