"""Figures as files: pictures through kaleido and the system's browser, pages of their own without either."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go

import store
from app.figures.style import Theme, palette
from moescope.errors import InputError, RunError

Picture = Literal["svg", "png", "pdf"]
WIDTH, HEIGHT = 1000, 420
"""Pixels of a figure that says nothing of its own."""

_CONFIG = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"format": "svg"}}
_INSTALL = "html, csv, parquet and json need neither"


def picture(
    figure: go.Figure,
    kind: Picture,
    *,
    theme: Theme = "light",
    width: int | None = None,
    height: int | None = None,
    scale: float = 1.0,
) -> bytes:
    """A figure as a picture on the theme's background; the same figure gives the same bytes.

    Args:
        width, height: pixels (points of a PDF); None = as the figure has it.
        scale: of a PNG, pixels per pixel.

    Raises:
        InputError: kaleido or a browser is missing; the message says what to install.
        RunError: the browser could not draw it.
    """
    try:
        import kaleido
        from kaleido.errors import BrowserFailedError, ChromeNotFoundError
    except ImportError:
        raise InputError(f"{kind} needs kaleido: pip install 'moescope[images]'; {_INSTALL}") from None
    shown = _on_background(figure, theme)
    for index, trace in enumerate(shown.data):
        trace.uid = f"{index:06x}"  # drawn at random otherwise, and written into ids
    size = {
        "width": width or shown.layout.width or WIDTH,
        "height": height or shown.layout.height or HEIGHT,
        "scale": scale if kind == "png" else 1,
    }
    try:
        # MathJax would be fetched from the network.
        drawn: bytes = kaleido.calc_fig_sync(shown, opts={"format": kind, **size}, kopts={"mathjax": False})
    except (ChromeNotFoundError, BrowserFailedError) as error:
        raise InputError(
            f"{kind} needs Chromium or Chrome, and none starts ({_first_line(error)}): install it, or name it in "
            f"BROWSER_PATH; {_INSTALL}"
        ) from None
    except Exception as error:  # whatever a browser can run into
        raise RunError(f"the browser could not draw the figure: {_first_line(error)}") from error
    return _without_chance(drawn, kind)


def page(figure: go.Figure, *, theme: Theme = "light", width: int | None = None, height: int | None = None) -> bytes:
    """A figure as one HTML file that can be zoomed and opens without a network; always the same bytes."""
    shown = _on_background(figure, theme)
    shown.update_layout({name: size for name, size in (("width", width), ("height", height)) if size is not None})
    html: str = shown.to_html(include_plotlyjs=True, full_html=True, div_id="figure", config=_CONFIG)
    return html.replace("<body>", f'<body style="margin: 12px; background: {palette(theme).background}">', 1).encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears at once, whole.

    Raises:
        InputError: it cannot be written there.
        RunError: the disk is full.
    """
    store.write_whole(path, content)


def _on_background(figure: go.Figure, theme: Theme) -> go.Figure:
    copy = go.Figure(figure)
    background = palette(theme).background
    copy.update_layout(paper_bgcolor=background, plot_bgcolor=background)
    return copy


def _without_chance(drawn: bytes, kind: Picture) -> bytes:
    """The picture without the number that Plotly draws for its ids, and without the time."""
    if kind == "svg" and (found := re.search(rb'id="defs-([0-9a-f]{6})"', drawn)):
        return re.sub(rb"(?<![0-9a-f])" + found[1] + rb"(?![0-9a-f]{3})", b"000000", drawn)
    if kind == "pdf":
        return re.sub(rb"(Date \(D:)\d{14}", rb"\g<1>19800101000000", drawn)
    return drawn


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
