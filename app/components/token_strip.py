"""The text of a sequence with every token coloured, and the experts of the token under the pointer beside it.

Drawn by a small script in the page. All text from data reaches the document as text nodes only, never as HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import streamlit as st

from app import focus, state
from app.figures import token_colours
from app.figures.style import Theme
from app.frames.token_measure import Measure
from app.frames.token_routes import Routes

_HERE = Path(__file__).parent
_MOUNTS: dict[str, Callable[..., Any]] = {}


def token_strip(
    tokens: pl.DataFrame,
    routes: Routes,
    colours: pl.DataFrame,
    *,
    layer: str,
    mode: str,
    selected: int | None,
    on_select: Callable[[], None],
    key: str = "strip",
    title: str = "",
    linked: str | None = None,
    marks: Sequence[int] | None = None,
    marked: str = "marked",
    measure: Measure | None = None,
    experts: Sequence[int] | None = None,
    total: int | None = None,
) -> Any:
    """Draw the strip; a click or Enter calls ``on_select`` with the position in ``st.session_state[key].selected``.

    A click on an expert beside the text picks its layer and expert.

    Args:
        tokens: part of ``app.frames.tokens.sequence_tokens``: successive positions.
        routes: the same positions of ``app.frames.tokens.routes``.
        colours: one row per token that is coloured: position, expert (its first choice), and for other modes than
            "expert" the measure, in column ``mode`` or ``value``; null = not known.
        layer: label of the layer that colours the text.
        mode: "expert" = a colour for each first choice, or the name of a measure.
        selected: position that is marked.
        on_select: called after a click.
        title: stands above the text.
        linked: strips of the same name show the token under the pointer together, and scroll together.
        marks: positions that are underlined.
        marked: what the underlined ones are, for the legend.
        measure: words and range of the measure; without, a share of 1.
        experts: the experts that get a colour of their own, in order; without, the most frequent first choices.
        total: tokens of the whole sequence, where the strip shows a part: arrow keys lead out of it.
    """
    payload = encode(tokens, colours, mode=mode, measure=measure, experts=experts, theme=state.theme()) | {
        "layer": layer,
        "labels": routes.labels,
        "selected": selected,
        "title": title,
        "linked": linked,
        "marks": [int(position) for position in marks or ()],
        "marked": marked,
        "total": total if total is not None else int(tokens["position"].max() or 0) + 1,  # type: ignore[arg-type]
        "routes": f"{key}-routes",
        "focus": focus.current().expert,
    }
    with st.container(gap=None, key=f"{key}-box"):
        # Apart, because it is large and stays the same while colours and the kept token change: it is sent once.
        carried = {"name": f"{key}-routes", "start": routes.start, "count": routes.count, **routes.packed}
        _mount("routes", "<span hidden></span>\n")(key=f"{key}-routes", data=carried, height=1)
        return _mount("strip", "<div class='strip'></div>\n")(
            key=key, data=payload, on_selected_change=on_select, on_picked_change=_pick(key), height="content"
        )


def encode(
    tokens: pl.DataFrame,
    colours: pl.DataFrame,
    *,
    mode: str,
    measure: Measure | None = None,
    experts: Sequence[int] | None = None,
    theme: Theme = "light",
) -> dict[str, Any]:
    """What the script draws but for the experts: texts, the colour and the value of each token, and the legend."""
    start, count = int(tokens["position"].min() or 0), len(tokens)  # type: ignore[arg-type]
    at = colours["position"].to_numpy() - start
    first = np.full(count, -1)
    first[at] = colours["expert"].to_numpy()
    common = {
        "start": start,
        "texts": tokens["text"].to_list(),
        "special": [bool(value) for value in tokens["special"].to_list()],
        "first": first.tolist(),
    }
    if mode == "expert":
        named = list(experts) if experts is not None else token_colours.most_frequent(first)
        chips = token_colours.expert_colours(named, theme)
        place = {expert: index for index, expert in enumerate(named[: len(chips) - 1])}
        paint = [-1 if one < 0 else place.get(one, len(chips) - 1) for one in first.tolist()]
        legend = {"kind": "experts", "experts": named[: len(chips) - 1], "label": "first choice"}
        return common | {"paint": paint, "inks": chips, "values": None, "legend": legend}
    shown = measure or Measure(mode, mode)
    values = np.full(count, np.nan)
    column = colours[mode] if mode in colours.columns else colours["value"]
    values[at] = column.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    inks = token_colours.ramp(theme)
    return common | {
        "paint": token_colours.shades(values, low=shown.low, high=shown.high, count=len(inks)).tolist(),
        "inks": inks,
        "values": [None if np.isnan(value) else float(f"{value:.4g}") for value in values],
        "legend": {
            "kind": "ramp", "label": shown.label, "unit": shown.unit, "low": shown.low, "high": shown.high,
            "above": bool(np.nanmax(values, initial=-np.inf) > shown.high * (1 + 1e-9)),
        },
    }  # fmt: skip


def _pick(key: str) -> Callable[[], None]:
    def picked() -> None:
        found = getattr(st.session_state.get(key), "picked", None)
        if isinstance(found, dict):
            focus.pick(layer=found.get("layer"), expert=found.get("expert"))

    return picked


def _mount(name: str, html: str) -> Callable[..., Any]:
    """A registered component; registered once per process."""
    if name not in _MOUNTS:
        css = (_HERE / "token_strip.css").read_text(encoding="utf-8") if name == "strip" else ""
        js = (_HERE / f"token_{name}.js").read_text(encoding="utf-8")
        _MOUNTS[name] = st.components.v2.component(f"moescope_token_{name}", html=html, css=css or None, js=js)
    return _MOUNTS[name]
