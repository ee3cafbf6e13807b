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
_BY_DOMAIN = (exhibits.costs, studies.contrast_accuracy, studies.search)


def section(run: Run) -> None:
    """Draw the section."""
    try:
        names = [path.stem for path in store.list_evaluations(run.path, "sweep")]
        if not names:
            exhibits.chosen(run, None)
        _part(run, *_sweep(run, names))
    except Absent as missing:
        chart.absent(missing)
    except MoescopeError as error:
        st.warning(state.plain(str(error), 400), icon=":material/broken_image:")
    compress_apply.running_jobs(run)


def _sweep(run: Run, names: list[str]) -> tuple[str, dict[str, Any]]:
    """The sweep that is shown: the newest of rules, of a plan where there is none, or the chosen one of several."""
    documents = {name: exhibits.chosen(run, name) for name in names}
    names = sorted(names, key=lambda name: frames.is_of_a_plan(documents[name]))
    name = names[0]
    if len(names) > 1:
        words: Callable[[str], str] = lambda one: frames.title(documents[one])  # noqa: E731
        with st.container(width=320):
            name = state.choose("Sweep", names, key="sweep", words=words)
    return name, documents[name]


def _part(run: Run, name: str, document: dict[str, Any]) -> None:
    there = [part for part in _PARTS if document.get(_STUDIES.get(part, "rules")) is not None]
    masked = [row for row in (document.get("rules") or []) if row.get("rule") in ("mask_top", "shared")]
    there = [part for part in there if part != "Redundancy" or masked]
    if not there:
        st.info("This sweep holds no result.", icon=":material/visibility_off:")
        return
    chosen = state.choose("What was tried", there, key="live", segmented=True, hidden=True)
    answer, makers = _PARTS[chosen]
    more: dict[str, Any] = {"sweep": name}
    if words := answer(run, **more):
        st.markdown(words)
    title = f"On the model itself: {state.plain(frames.title(document))}."
    st.markdown(f":green-badge[:material/science: measured] :small[:gray[{title}]]")
    if makers[0] in _BY_TRIAL:
        more |= _trial(document)
    where = {"domain": _domain(document)} if set(makers) & set(_BY_DOMAIN) else {}
    beside, alone = (makers[:-1], makers[-1:]) if len(makers) % 2 else (makers, ())
    with chart.pair():
        for maker in beside:
            _chart(maker, run, more, where)
    for maker in alone:
        _chart(maker, run, more, where)


def _chart(maker: Callable[..., Exhibit], run: Run, more: dict[str, Any], where: dict[str, Any]) -> None:
    """One chart, drawn anew each time: a sweep with more rules is written into the file of the one before, which the
    version of the run does not tell."""
    asked = more | where if maker in _BY_DOMAIN else more
    try:
        made = maker(run, theme=state.theme(), **asked)
    except Absent as missing:
        chart.absent(missing)
        return
    chart.draw(made, key=f"live-{maker.__name__}")


def _domain(document: dict[str, Any]) -> str | None:
    """Whose text is looked at, of the domains that the sweep read."""
    names = [name for name in frames.rules(document)["domain"].unique(maintain_order=True) if name != "all"]
    if len(names) < 2:
        return None
    with st.container(width=200):
        return state.choose_domain(names)


def _trial(document: dict[str, Any]) -> dict[str, str]:
    """The rule whose tokens are looked at, where several let them differ."""
    names = frames.difficulty(document)["trial"].unique(maintain_order=True).to_list()
    if len(names) < 2:
        return {}
    with st.container(width=260):
        return {
            "trial": state.choose("Rule", names, key="trial", default=exhibits.trial_of(document, None, varied=True))
        }
