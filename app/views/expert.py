"""Expert: what one expert is for: its domains, its tokens, its neighbours, and what would be lost with it."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, focus, state
from app.components import chart, expert_errors, expert_text, header
from app.components.page import render
from app.figures import expert as drawings
from app.frames import expert as frames
from app.frames.similarity import kinds
from store import Run

_number = st.column_config.NumberColumn


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Expert", run, what="What is one expert for: which text does it take, and who is like it?")
    if not run.layers:
        st.info("No layer has been recorded yet.", icon=":material/hourglass_top:")
        return
    label, expert = focus.current().layer_in(run), focus.current().expert_in(run)
    where = {"label": label, "expert": expert}
    _figures(run, where)
    _domains(run, where)
    expert_text.tokens(run, where)
    expert_text.contexts(run, where)
    _partners(run, where)
    _importance(run, where)
    expert_errors.section(run, where)


def _key(name: str, where: dict[str, Any]) -> str:
    return f"expert-{name}-{where['label']}-{where['expert']}"


def _figures(run: Run, where: dict[str, Any]) -> None:
    frame = data.frame(frames.figures, run, **where)
    if frame.is_empty():
        st.info("Nothing has been counted in this layer yet.", icon=":material/hourglass_top:")
        return
    with st.container(border=True, gap="xsmall"):
        st.dataframe(
            frame,
            hide_index=True,
            alt="Key figures of the expert beside the mean of its layer",
            column_config={
                "value": _number("this expert", format="%.4f"),
                "low": _number(format="%.4f"),
                "high": _number(format="%.4f"),
                "beside": _number("mean of the layer", format="%.4f"),
                "chance": _number(
                    "by chance", format="%.4f", help="an even router, or the text with its order shuffled"
                ),
                "tokens": _number(format="localized"),
            },
        )
        chart.caption(
            "low to high: 95 % interval, where one was computed. By chance: what an even router gives every expert, or "
            "the mean of the layer when the labels or tokens of the text are shuffled (docs/metrics.md).",
            frame,
            None,
            key=_key("figures", where),
        )


def _domains(run: Run, where: dict[str, Any]) -> None:
    frame = data.frame(frames.domain_load, run, **where)
    total, sequences = int(frame["tokens"].sum()), frame["sequences"].drop_nulls().sum()
    bars = " Bars end in 95 % intervals over sequences." if frame["low"].drop_nulls().len() else ""
    chart.show(
        drawings.domain_shares(frame, title="Share of each domain's tokens", theme=state.theme()),
        frame,
        key=_key("domains", where),
        read="Bars beyond the dashed line: text that this expert takes more of than of other text. Dotted: what an "
        f"even router would send it.{bars}",
        rests_on=f"{total:,} tokens" + (f", {sequences:,} sequences." if sequences else "."),
        alt="Bars: share of the tokens of each domain that use the expert",
    )


def _partners(run: Run, where: dict[str, Any]) -> None:
    frame = data.frame(frames.partners, run, **where)
    titles = dict(data.frame(kinds, run).select("kind", "title").iter_rows())
    alike = [name for name in titles if name in frame.columns]
    if frame.is_empty() or len(frame.columns) < 2:
        header.omitted("Which experts are used together or alike", run, "trace", "outputs")
        return
    st.subheader("Its neighbours", anchor=False)
    columns = {name: _number(titles[name], format="%.3f") for name in alike} | {
        "other": _number("expert"),
        "joint_tokens": _number("joint tokens", format="localized"),
        "given": _number("together", format="percent", help="of this expert's tokens, those that use the other too"),
        "lift": _number(format="%.2f", help="together over what the other's popularity gives; 1 = by chance"),
    }
    with st.container(border=True, gap="xsmall"):
        order = [name for name in ("lift", *alike) if name in frame.columns]
        words = {"lift": "used together", **titles}
        by = state.choose("Nearest by", order, key="near", words=words.__getitem__)
        shown = frame.sort(by, descending=True, nulls_last=True)
        st.dataframe(shown, hide_index=True, height=320, column_config=columns, alt="The other experts of the layer")
        chart.caption(
            "Used together says which experts share tokens, alike which could stand in for each other: alike experts "
            "that are never used together are rivals for the same tokens. The page Similarity has all pairs.",
            shown,
            None,
            key=_key("neighbours", where),
        )


def _importance(run: Run, where: dict[str, Any]) -> None:
    st.subheader("What would be lost", anchor=False)
    frame = frames.of_expert(data.frame(frames.importance, run), **where)
    chart.show(
        drawings.importance_ranks(frame, title="Place in the layer by every score of importance", theme=state.theme()),
        frame,
        key=_key("importance", where),
        read="Left: by this score the layer can spare it least. Scores that disagree measure different things: an "
        "expert may be used rarely and put out much. Dotted: the middle of the layer.",
        rests_on="Ranks of whole experts; docs/importance.md says what each score is.",
        alt="Dots: rank of the expert in its layer by every score of importance",
    )
    expert_errors.scores(frame)
    _outliers(run, where)
    ablated = data.frame(frames.ablations, run, **where)
    if not ablated.is_empty():
        st.markdown("**It was switched off, alone or with others:**")
        st.dataframe(ablated, hide_index=True, alt="Passes of the ablations with this expert among the chosen ones")


def _outliers(run: Run, where: dict[str, Any]) -> None:
    frame = data.frame(frames.outliers, run, **where)
    if frame.is_empty():
        if not run.live:
            header.needs_level("What the expert puts out", "activations", run)
        return
    row = frame.row(0, named=True)
    rules = [name for name, rule in (("the paper's rule", "paper"), ("its code's rule", "code")) if row[rule]]
    verdict = f"a super expert by {' and '.join(rules)}" if rules else "no super expert"
    st.markdown(
        f"Largest output {row['value']:,.3g}: rank {row['layer_rank']} of {row['of_layer']} in the layer, "
        f"{row['rank']:,} of {row['of']:,} in the model; it is **{verdict}**. It stood in channel {row['channel']}, at "
        f"position {row['position']} of sequence {row['sequence']}."
    )


if __name__ == "__main__":
    render(page)
