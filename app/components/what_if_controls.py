"""What the page What-if routing is asked: whose text, how much of it, which rule, at which values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl
import streamlit as st

from app import data, state
from app.exhibits import what_if as exhibits
from app.exhibits.exhibit import Absent
from app.frames import what_if as frames
from planner.simulate.what_if import WhatIf
from store import Run

_COLOURS = {"exact": "green", "proxy": "orange", "needs a live run": "red"}
_ICONS = {"exact": ":material/verified:", "proxy": ":material/approval:", "needs a live run": ":material/play_circle:"}
_WEIGHTS = {"renormalized": "scaled up", "kept": "as they were"}


@dataclass(frozen=True)
class Text:
    """Whose text counts, and whether all of it is read."""

    domain: str | None
    whole: bool

    @property
    def choices(self) -> dict[str, Any]:
        """As exhibits take them."""
        return {"domain": self.domain, "whole": self.whole}


def text(run: Run) -> Text:
    """Whose text counts, and whether all of it is read."""
    with _row():
        return _text(run)


def _row() -> Any:
    return st.container(horizontal=True, gap="small", vertical_alignment="bottom")


def _text(run: Run) -> Text:
    """The same within a row; the switch only where a first look leaves some text out."""
    domain, whole = None, False
    if len(run.domains) > 1:
        with st.container(width=160):
            domain = state.choose_domain(run.domains)
    limit = frames.limit_of(run, False)
    if limit is not None and run.info.tokens > limit:
        whole = state.choose_flag(
            "All tokens", key="whole", default=False,
            help=f"A first look reads about {limit:,} of the {run.info.tokens:,} tokens, in sequences that are spread "
            "evenly over the text.",
        )  # fmt: skip
    return Text(domain, whole)


def tiers(run: Run) -> tuple[Text, dict[str, float]]:
    """Draw whose text counts and both thresholds of the precision tiers.

    Returns:
        the text; ``value`` (T1) and ``skip_above`` (T2) as exhibits take them.
    """
    with _row():
        asked = _text(run)
        words = [f"{value:g}" for value in frames.VALUES["tiers"]]
        with st.container(width=300):
            first = _threshold("T1: high precision up to", words, key="t1", default="0.6")
        with st.container(width=300):
            last = _threshold("T2: left out beyond", [*words[1:], "1"], key="t2", default="0.9")
    return asked, {"value": first, "skip_above": last}


def _threshold(label: str, words: list[str], *, key: str, default: str) -> float:
    return float(_slider(label, words, key=key, first=default, help="Of the gate weights before, added up."))


def rule(run: Run, *, plan: bool = False) -> tuple[dict[str, Any], WhatIf]:
    """Draw whose text counts, the method and its value; for a plan also what becomes of the gate weights.

    Returns:
        choices of the exhibits, and the result at all values.

    Raises:
        Absent: no rule can be tried on this run.
    """
    table = data.frame(frames.methods, run).filter(pl.col("name").is_in(frames.CURVES))
    first = exhibits.first_method(run, data.frame)
    here = table.filter("here")["name"].to_list()
    with _row():
        asked = _text(run)
        with st.container(width=270):
            method = state.choose("Rule", here, key="rule", default=first, words=lambda name: frames.about(name).title)
        weights = "renormalized"
        if plan:
            with st.container(width=170):
                weights = state.choose(
                    "Gate weights that stay", list(_WEIGHTS), key="weights", words=_WEIGHTS.__getitem__,
                    help="It changes no figure here: only what a plan does, and what a live run measures.",
                )  # fmt: skip
        chosen: dict[str, Any] = {"method": method, "weights": weights, **asked.choices}
        with st.spinner("Trying the rule on the trace"):
            result = exhibits.looked(run, data.frame, **chosen)
        with st.container(width=340):
            value = _value(result, frames.about(method).value)
    return chosen | {"value": value}, result


def certainty(result: WhatIf, value: float | None = None) -> None:
    """How far a result can be trusted, in a word and a sentence."""
    word = result.certainty if value is None else exhibits.certainty_at(result, value)
    notes = " ".join(state.plain(note, 300) for note in result.notes)
    said = f"{state.plain(result.why, 500)} {notes} What it does to the loss needs a live run."
    st.markdown(f":{_COLOURS[word]}-badge[{_ICONS[word]} {word}] :small[:gray[{said}]]")


def trusted(run: Run, method: str, asked: Text, **options: Any) -> None:
    """How far a method without values to choose can be trusted."""
    try:
        certainty(exhibits.looked(run, data.frame, method=method, **asked.choices, **options))
    except Absent:
        return


def hidden(run: Run) -> None:
    """The methods that cannot be tried, and why, in one line."""
    lacking = data.frame(frames.methods, run).filter(~pl.col("here") & ~pl.col("name").is_in(["bias", *frames.FITTED]))
    if lacking.is_empty():
        return
    reasons: dict[str, list[str]] = {}
    for row in lacking.iter_rows(named=True):
        reason = str(row["missing"]).removeprefix(f"{row['title']} ")
        reasons.setdefault(reason, []).append(row["title"])
    words = "; ".join(f"{', '.join(titles)}: {state.plain(reason, 260)}" for reason, titles in reasons.items())
    st.caption(f"Not shown: {words}")


def _value(result: WhatIf, axis: str) -> float:
    """The slider over the values that were tried; in the address by its text."""
    words = [f"{value:.4g}" for value in sorted(result.values.tolist())]
    first = f"{exhibits.value_in(result, None):.4g}"
    if len(words) == 1:
        return float(words[0])
    label = axis if len(axis) == 1 else axis[0].upper() + axis[1:]
    about = "Where it begins: the fewest experts that keep 95 % of the mass."
    return float(_slider(label, words, key="value", first=first, help=about))


def _slider(label: str, words: list[str], *, key: str, first: str, help: str) -> str:
    if st.session_state.get(key, first) not in words:
        del st.session_state[key]
    held = st.select_slider(label, words, value=first, key=key, bind="query-params", help=help)
    return str(held) if held in words else first
