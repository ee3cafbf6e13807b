"""A chart card: the figure, the sentence that says how to read it, and its downloads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import polars as pl
import streamlit as st

from app import data, images, state
from app.exhibits.exhibit import Absent, Exhibit
from app.frames.plain import encoded
from store import Run


def exhibit(maker: Callable[..., Exhibit], run: Run, *, key: str, bordered: bool = True, **choices: Any) -> bool:
    """Draw one exhibit of a run, or say why it is not there; whether it was drawn.

    Args:
        maker: from ``app/exhibits/``.
        key: unique on the page; names the downloaded files.
        choices: what ``maker`` is told.
    """
    try:
        made = data.exhibit(maker, run, theme=state.theme(), **choices)
    except Absent as missing:
        absent(missing)
        return False
    draw(made, key=key, bordered=bordered)
    return True


def draw(made: Exhibit, *, key: str, bordered: bool = True) -> None:
    """Draw an exhibit that was made already."""
    show(
        made.figure, made.frame, key=key, read=made.read, alt=made.alt, rests_on=made.rests_on, bordered=bordered
    )  # fmt: skip


def absent(missing: Absent) -> None:
    """Why something is not there, and the command that would change it."""
    with st.container(gap="xsmall"):  # one cell of a grid
        st.info(state.plain(missing.reason, 400), icon=":material/visibility_off:")
        if missing.remedy:
            st.code(missing.remedy, language="bash")


def show(
    figure: go.Figure, frame: pl.DataFrame, *, key: str, read: str, alt: str, rests_on: str = "", bordered: bool = True
) -> None:
    """Draw one figure.

    Args:
        figure: what to draw.
        frame: the data behind it, for the downloads.
        key: unique on the page; names the downloaded files.
        read: one or two sentences on how to read the figure.
        alt: what the figure shows, for those who do not see it.
        rests_on: number of tokens, interval or source, where they apply.
    """
    with st.container(border=bordered, gap="xsmall", height="stretch"):
        st.plotly_chart(figure, key=f"chart-{key}", theme="streamlit", width="stretch", alt=alt, config=_config(key))
        caption(read + (f" *{rests_on}*" if rests_on else ""), frame, figure, key=key)


def pair() -> Any:
    """Two cards beside each other, or below each other where the window is narrow; a context."""
    return st.grid(2, min_column_width=400, gap="small")


def caption(text: str, frame: pl.DataFrame, figure: go.Figure | None, *, key: str) -> None:
    """A sentence in Markdown, and the downloads at its right."""
    with st.container(horizontal=True, wrap=False, vertical_alignment="top", gap="medium"):
        st.caption(text, width="stretch")
        downloads(frame, figure, key=key)


def downloads(frame: pl.DataFrame, figure: go.Figure | None, *, key: str) -> None:
    """A menu with the data as CSV and Parquet and the figure as a page of its own; each is made on click."""
    name = file_name(key)
    with st.popover("Download", icon=":material/download:", type="tertiary", key=f"download-{key}"):
        st.download_button(
            "Data, CSV",
            lambda: encoded(frame, "csv"),
            f"{name}.csv",
            "text/csv",
            key=f"csv-{key}",
            on_click="ignore",
            width="stretch",
        )
        st.download_button(
            "Data, Parquet",
            lambda: encoded(frame, "parquet"),
            f"{name}.parquet",
            "application/vnd.apache.parquet",
            key=f"parquet-{key}",
            on_click="ignore",
            width="stretch",
        )
        if figure is not None:
            st.download_button(
                "Figure, HTML",
                lambda: images.page(figure, theme=state.theme()),
                f"{name}.html",
                "text/html",
                key=f"html-{key}",
                on_click="ignore",
                width="stretch",
            )
            st.caption("SVG: the camera in the figure's corner.")


def file_name(key: str) -> str:
    """The name of downloaded files: the run and the chart, in characters that every file system takes."""
    run = str(st.session_state.get("run") or "run")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{run}-{key}").strip("-")


def _config(key: str) -> dict[str, object]:
    return {
        "displaylogo": False,
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
        "toImageButtonOptions": {"format": "svg", "filename": file_name(key)},
    }
