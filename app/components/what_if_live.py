"""The section Live: what rules did to the model itself, from sweeps beside the run; else the command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

import store
from app import state
from app.components import chart, compress_apply
from app.exhibits import sweep as exhibits
from app.exhibits import sweep_answers as answers
from app.exhibits import sweep_studies as studies
from app.exhibits.exhibit import Absent, Exhibit
from app.frames import sweep as frames
from moescope.errors import MoescopeError
from store import Run

_PARTS: dict[str, tuple[Callable[..., str], tuple[Callable[..., Exhibit], ...]]] = {
    "Loss": (answers.costs, (exhibits.costs, exhibits.domains)),
    "Harder tokens": (answers.difficulty, (exhibits.difficulty, exhibits.correlations, exhibits.active)),
    "Number of experts": (answers.slimmability, (exhibits.loss_over_k,)),
    "Redundancy": (answers.redundancy, (exhibits.redundancy,)),
    "Contrast": (answers.contrast, (studies.contrast_kl, studies.contrast_accuracy)),
    "Rerouting": (answers.rerouting, (studies.rerouting,)),
    "Items": (answers.search, (studies.search,)),
}
"""What a sweep can hold: its answer, and its charts."""
_STUDIES = {"Contrast": "contrast", "Rerouting": "rerouting", "Items": "search", "Number of experts": "slimmability"}
_BY_TRIAL = (exhibits.difficulty, exhibits.correlations, exhibits.active)


def section(run: Run) -> None:
    """Draw the section."""
    try:
        names = [path.stem for path in store.list_evaluations(run.path, "sweep")]
        if not names:
            exhibits.chosen(run, None)
        name, document = _sweep(run, names)
    except Absent as missing:
        chart.absent(missing)
    except MoescopeError as error:
        st.warning(state.plain(str(error), 400), icon=":material/broken_image:")
    else:
        _part(run, name, document)
    compress_apply.running_jobs(run)


def _sweep(run: Run, names: list[str]) -> tuple[str, dict[str, Any]]:
    """The sweep that is shown: the newest, or the chosen one where there are several."""
    documents = {name: exhibits.chosen(run, name) for name in names}
    name = names[0]
    if len(names) > 1:
        words: Callable[[str], str] = lambda one: frames.title(documents[one])  # noqa: E731
        name = state.choose("Sweep", names, key="sweep", words=words)
    return name, documents[name]


def _part(run: Run, name: str, document: dict[str, Any]) -> None:
    there = [part for part in _PARTS if document.get(_STUDIES.get(part, "rules")) is not None]
    masked = [row for row in document["rules"] if row.get("rule") in ("mask_top", "shared")]
    there = [part for part in there if part != "Redundancy" or masked]
    chosen = state.choose("What was tried", there, key="live", segmented=True, hidden=True)
    answer, makers = _PARTS[chosen]
    more: dict[str, Any] = {"sweep": name}
    if words := answer(run, **more):
        st.markdown(words)
    if makers[0] in _BY_TRIAL:
        more |= _trial(document)
    if len(makers) == 1:
        chart.exhibit(makers[0], run, key=f"live-{makers[0].__name__}", **more)
        return
    with chart.pair():
        for maker in makers:
            chart.exhibit(maker, run, key=f"live-{maker.__name__}", **more)


def _trial(document: dict[str, Any]) -> dict[str, str]:
    """The rule whose tokens are looked at, where several let them differ."""
    names = frames.difficulty(document)["trial"].unique(maintain_order=True).to_list()
    if len(names) < 2:
        return {}
    with st.container(width=260):
        return {
            "trial": state.choose("Rule", names, key="trial", default=exhibits.trial_of(document, None, varied=True))
        }
