"""The section SQL: a question, what can be asked of, and the answer as table or chart."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import streamlit as st

import store
from app import data, state
from app.components import chart, table
from app.figures.answer import KINDS, answer_chart
from app.frames.answers import SECONDS, Asked, ask, default_chart
from app.text import sentence
from store import Run

MOST_LETTERS = 4000
"""Of a question, so that its address can be sent."""

_ROWS = ("100", "1000", "10000")
_NONE = "none"
_READ = "Lists and bytes are shown as text, long cells in part; the downloads hold all rows of this answer whole."


def section(run: Run) -> None:
    """Draw the section."""
    if "sql" not in st.session_state and "sql" not in st.query_params:
        st.session_state["sql"] = st.session_state.get("sql-last") or store.EXAMPLES[0].sql.strip()
    _examples()
    left, right = st.columns((5, 3), gap="medium")
    with left:
        st.text_area(
            "Question", key="sql", bind="query-params", height=200, max_chars=MOST_LETTERS, help=_HELP,
            placeholder="One SELECT over the tables at the right",
        )  # fmt: skip
        rows, others = _limits(run)
    with right:
        _schema(several=bool(others))
    sql = (st.session_state.get("sql") or "").strip()
    st.session_state["sql-last"] = sql  # for when the page is visited again
    if not sql:
        st.info("Write a question, or take one of the examples.", icon=":material/edit:")
        return
    _answer(run, _asked(run, sql, rows, others), rows)


def _examples() -> None:
    st.pills(
        "Examples", [one.title for one in store.EXAMPLES], key="sql-example", on_change=_take_example,
        label_visibility="collapsed", wrap=True,
    )  # fmt: skip


def _take_example() -> None:
    chosen = st.session_state.get("sql-example")
    for one in store.EXAMPLES:
        if one.title == chosen:
            st.session_state["sql"] = one.sql.strip()
    st.session_state["sql-example"] = None


def _limits(run: Run) -> tuple[int, tuple[Path, ...]]:
    """How many rows, and which other runs are asked too."""
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        st.button("Run", icon=":material/play_arrow:", type="primary", key="sql-run", on_click=_again)
        rows = state.choose(
            "Rows at most", _ROWS, key="rows", default="1000", words=lambda text: f"{int(text):,}", segmented=True
        )
        known = {name: entry.path for name, entry in data.entries().items() if not entry.live and name != run.name}
        names = [] if run.live or not known else state.choose_some(
            "Together with", list(known), key="with", none="no other run", help="Tables then have the column run."
        )  # fmt: skip
    return int(rows), tuple(known[name] for name in names)


def _again() -> None:
    """Forget the last answer, so that the same question is asked anew."""
    st.session_state.pop("sql-answer", None)


def _asked(run: Run, sql: str, rows: int, others: tuple[Path, ...]) -> Asked:
    """The answer; the last one is kept, so that looking at it another way asks nothing."""
    question = (run.version, sql, rows, tuple((path, store.version_of(path)) for path in others))
    kept = st.session_state.get("sql-answer")
    if kept is None or kept[0] != question:
        with st.spinner("Asking"):
            kept = (question, ask(run, sql=sql, rows=rows, others=others))
        st.session_state["sql-answer"] = kept
    found: Asked = kept[1]
    return found


def _answer(run: Run, asked: Asked, rows: int) -> None:
    if asked.answer is None:
        st.error(state.plain(asked.error.removeprefix("the query failed: "), 600), icon=":material/error:")
        return
    shown = asked.shown
    said = f"{len(shown):,} row{'s' if len(shown) != 1 else ''} in {asked.answer.seconds:.2f} s"
    if asked.answer.cut:
        more = " Take more rows above, or" if rows < int(_ROWS[-1]) else " For more, group or filter, or"
        st.warning(
            f"Cut: these are the first {rows:,} rows, and there are more.{more} ask with `moescope query --rows N`.",
            icon=":material/content_cut:",
        )
    begin = default_chart(shown)
    if begin and state.choose("Show", ["table", "chart"], key="show", segmented=True, hidden=True) == "chart":
        _chart(shown, begin, asked.answer.frame, said)
        return
    columns = {name: column_of(name, kind) for name, kind in shown.schema.items()}
    table.show(
        shown, key="answer", alt="Answer of the question", read=f"{said}. {_READ}", columns=columns, height=560,
        whole=asked.answer.frame,
    )  # fmt: skip


def _chart(frame: pl.DataFrame, begin: dict[str, str], whole: pl.DataFrame, said: str) -> None:
    names = list(frame.columns)
    _begin_anew(names, begin)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        kind = state.choose("Chart", KINDS, key="chart", default=begin["kind"])
        x = state.choose("x", names, key="x", default=begin["x"])
        y = state.choose("y", names, key="y", default=begin["y"])
        shades = names if kind == "heatmap" else [_NONE, *names]
        default = begin["colour"] or _NONE
        colour = state.choose("Value" if kind == "heatmap" else "Colour", shades, key="colour", default=default)
    figure = answer_chart(
        frame, kind=kind, x=x, y=y, colour="" if colour == _NONE else colour, theme=state.theme()  # type: ignore[arg-type]
    )  # fmt: skip
    chart.show(
        figure, whole, key="answer", read=f"{said}. A cell or point that names a layer, an expert or a token picks it.",
        alt=f"Chart of the answer: {kind}",
    )  # fmt: skip


def _begin_anew(names: list[str], begin: dict[str, str]) -> None:
    """Propose a chart for an answer of other columns than the last one; an address is followed at first."""
    if st.session_state.get("sql-columns", names) != names:
        chosen = {"chart": begin["kind"], "x": begin["x"], "y": begin["y"], "colour": begin["colour"] or _NONE}
        st.session_state.update(chosen)
    st.session_state["sql-columns"] = names


def column_of(name: str, kind: pl.DataType) -> table.Column:
    """Shown under its own name, as its type says; layers and experts are names, not amounts."""
    if name in ("layer", "step", "expert", "sequence", "position", "token_id", "channel", "rank", "span"):
        return table.Column(name, "text")
    return table.Column(name, "count" if kind.is_integer() else "figure" if kind.is_float() else "text")


def _schema(*, several: bool) -> None:
    """Tables and columns, with types, units and what they mean."""
    known = data.reference(store.describe)
    names = known["table"].unique(maintain_order=True).to_list()
    chosen = st.selectbox("Tables", names, key="schema-table", index=names.index("expert_load"))
    part = known.filter(pl.col("table") == chosen)
    lines = [state.plain(sentence(part["about"][0]), 400), ""]
    lines += ["- **run** varchar · name of the run"] if several else []
    for _, _, column, kind, meaning in part.iter_rows():
        said = f" · {state.plain(meaning, 300)}" if meaning else ""
        lines.append(f"- **{state.plain(column)}** {state.plain(kind)}{said}")
    with st.container(height=262, border=True, key="schema"):
        st.caption("\n".join(lines))


_HELP = (
    f"One SELECT, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN, answered within {SECONDS:g} seconds. Ctrl+Enter runs it. "
    "Nothing but the runs can be read, and nothing written."
)
