"""The text of a sequence with every token coloured, and the experts of the token under the pointer beside it.

Drawn by a small script in the page. All text from data reaches the document as text nodes only, never as HTML.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import streamlit as st

_HERE = Path(__file__).parent
_MOUNT: Callable[..., Any] | None = None
GOLDEN_ANGLE = 137.508
"""Degrees between the hues of neighbouring experts, so that any few of them look different."""


def token_strip(
    tokens: pl.DataFrame,
    routes: pl.DataFrame,
    colours: pl.DataFrame,
    *,
    layer: str,
    mode: str,
    selected: int | None,
    on_select: Callable[[], None],
    key: str = "strip",
) -> Any:
    """Draw the strip; a click calls ``on_select`` with the position in ``st.session_state[key].selected``.

    Args:
        tokens: part of ``app.frames.tokens.sequence_tokens``: successive positions.
        routes: the same positions of ``app.frames.tokens.token_routes``.
        colours: the same positions of ``app.frames.tokens.layer_routes``.
        layer: label of the layer that colours the text.
        mode: "expert" | "weight" | "entropy".
        selected: position that is marked.
        on_select: called after a click.
    """
    payload = encode(tokens, routes, colours, layer=layer, mode=mode) | {"selected": selected}
    return _mount()(key=key, data=payload, on_selected_change=on_select, height="content")


def encode(
    tokens: pl.DataFrame, routes: pl.DataFrame, colours: pl.DataFrame, *, layer: str, mode: str
) -> dict[str, Any]:
    """What the script draws: texts; in base64, ids (layers, tokens, k) as int16 and weights as 8-bit parts."""
    start, count = int(tokens["position"].min() or 0), len(tokens)  # type: ignore[arg-type]
    labels = routes["label"].unique(maintain_order=True).to_list()
    width = int(routes["rank"].max()) + 1 if len(routes) else 0  # type: ignore[arg-type]
    ids = np.full((len(labels), count, width), -1, np.int16)
    weights = np.zeros(ids.shape, np.float64)
    row = {label: index for index, label in enumerate(labels)}
    at = (
        np.array([row[label] for label in routes["label"]], int),
        routes["position"].to_numpy() - start,
        routes["rank"].to_numpy(),
    )
    ids[at] = routes["expert"].to_numpy()
    weights[at] = routes["weight"].to_numpy()
    total = weights.sum(axis=-1, keepdims=True)
    parts = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    first, strength = _colour(colours, start, count, mode)
    return {
        "start": start,
        "texts": tokens["text"].to_list(),
        "special": [bool(value) for value in tokens["special"].to_list()],
        "labels": labels,
        "width": width,
        "layer": layer,
        "mode": mode,
        "first": first,
        "strength": strength,
        "ids": base64.b64encode(ids.astype("<i2").tobytes()).decode(),
        "parts": base64.b64encode(np.rint(parts * 255).astype(np.uint8).tobytes()).decode(),
        "angle": GOLDEN_ANGLE,
    }


def _colour(colours: pl.DataFrame, start: int, count: int, mode: str) -> tuple[list[int], list[float]]:
    """First choice of each token (-1 = none), and the strength (0..1) of its colour."""
    first, strength = np.full(count, -1), np.zeros(count)
    at = colours["position"].to_numpy() - start
    first[at] = colours["expert"].to_numpy()
    strength[at] = 1.0 if mode == "expert" else colours[mode].to_numpy()
    return first.tolist(), np.round(np.clip(np.nan_to_num(strength), 0, 1), 3).tolist()


def _mount() -> Callable[..., Any]:
    """The registered component; registered once per process."""
    global _MOUNT
    if _MOUNT is None:
        css = (_HERE / "token_strip.css").read_text(encoding="utf-8")
        js = (_HERE / "token_strip.js").read_text(encoding="utf-8")
        _MOUNT = st.components.v2.component("moescope_token_strip", html="<div class='strip'></div>\n", css=css, js=js)
    return _MOUNT
