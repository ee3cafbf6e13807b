"""What the user chose, and the URL: every choice is a widget bound to a query parameter of the same name.

Streamlit puts the shown text of an option into the URL, so options that belong in links are shown as they are. Values
from a URL are checked against what the run has; a bad one falls back to the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st

from app.figures.style import Theme
from app.markdown import code, plain
from store import Entry

ALL = "all"


@dataclass(frozen=True)
class Chosen:
    """The run that the sidebar shows."""

    entry: Entry

    @property
    def name(self) -> str:
        """Its name."""
        return self.entry.name


def theme() -> Theme:
    """The theme that the browser shows."""
    kind = getattr(st.context.theme, "type", None)
    return "dark" if kind == "dark" else "light"


def choose_run(entries: dict[str, Entry]) -> Chosen | None:
    """The sidebar's run selection; None in an empty store. The newest finished run stands first."""
    names = sorted(entries, key=lambda name: entries[name].live)
    if not names:
        return None
    _explain_missing(names)
    if st.session_state.get("run", st.query_params.get("run")) not in names:
        # Always set for the run, so that the address bar names it even where it is the default.
        st.session_state["run"] = names[0]
    st.markdown("**Run**")
    name = st.selectbox(
        "Run",
        names,
        key="run",
        index=None,
        required=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    return Chosen(entries[name if name in entries else names[0]])


def show_run(name: str) -> None:
    """Choose a run; for the callback of a button."""
    st.session_state["run"] = name


def choose(
    label: str,
    options: Sequence[str],
    *,
    key: str,
    default: str | None = None,
    words: Callable[[str], str] = str,
    help: str | None = None,
    segmented: bool = False,
    hidden: bool = False,
) -> str:
    """One of ``options``, bound to the query parameter ``key``; a value that is not among them reads as the default.

    ``hidden``: the label is for screen readers only.
    """
    options = list(options)
    first = default if default in options else options[0]
    if st.session_state.get(key, first) not in options:
        del st.session_state[key]  # the widget then takes its default; both at once are refused with a warning
    common: dict[str, Any] = {"key": key, "format_func": words, "help": help, "bind": "query-params"}
    if hidden:
        common["label_visibility"] = "collapsed"
    if segmented:
        value = st.segmented_control(label, options, default=first, required=True, **common)
    else:
        value = st.selectbox(label, options, index=options.index(first), **common)
    return value if value in options else first


def choose_number(label: str, *, key: str, low: int, high: int, default: int = 0, help: str | None = None) -> int:
    """A whole number between ``low`` and ``high``, bound to the query parameter ``key``."""
    held = st.session_state.get(key)
    if held is not None and not (isinstance(held, int) and low <= held <= high):
        del st.session_state[key]
    value = st.number_input(
        label, min_value=low, max_value=high, value=default, step=1, key=key, help=help, bind="query-params"
    )
    return int(value) if value is not None and low <= value <= high else default


def choose_size(label: str, *, key: str, low: float, high: float, default: float, help: str | None = None) -> float:
    """A number between ``low`` and ``high``, bound to the query parameter ``key``."""
    held = st.session_state.get(key)
    if held is not None and not (isinstance(held, int | float) and low <= held <= high):
        del st.session_state[key]
    value = st.number_input(
        label, min_value=low, max_value=high, value=default, key=key, help=help, format="%.4g", bind="query-params"
    )
    return float(value) if value is not None and low <= value <= high else default


def choose_share(label: str, *, key: str, default: int, help: str | None = None) -> int:
    """A share in per cent, 1 to 95, bound to the query parameter ``key``."""
    held = st.session_state.get(key)
    if held is not None and not (isinstance(held, int) and 1 <= held <= 95):
        del st.session_state[key]
    value = st.slider(label, 1, 95, default, format="%d %%", key=key, help=help, bind="query-params")
    return int(value) if 1 <= value <= 95 else default


def choose_some(label: str, options: Sequence[str], *, key: str, none: str, help: str | None = None) -> list[str]:
    """Some of ``options``, bound to the query parameter ``key``; values that are not among them are left out."""
    if key in st.session_state:
        st.session_state[key] = [name for name in st.session_state[key] if name in options]
    chosen = st.multiselect(label, options, key=key, placeholder=none, help=help, bind="query-params")
    return [name for name in chosen if name in options]


def choose_flag(label: str, *, key: str, default: bool, help: str | None = None) -> bool:
    """Yes or no, bound to the query parameter ``key``."""
    if not isinstance(st.session_state.get(key, default), bool):
        del st.session_state[key]
    return bool(st.toggle(label, value=default, key=key, help=help, bind="query-params"))


def domain_of(choice: str) -> str | None:
    """The domain that a choice names; None for all text."""
    return None if choice == ALL else choice


def choose_domain(domains: Sequence[str]) -> str | None:
    """A domain of the run, or None for all text."""
    words: Callable[[str], str] = lambda name: "all text" if name == ALL else name  # noqa: E731
    return domain_of(choose("Domain", [ALL, *domains], key="domain", words=words))


def choose_phase(phases: Sequence[str]) -> str | None:
    """A phase of the run, or None for both; no widget where there is only one."""
    if len(phases) < 2:
        return None
    words: Callable[[str], str] = lambda name: "both phases" if name == ALL else name  # noqa: E731
    choice = choose("Phase", [ALL, *phases], key="phase", words=words)
    return None if choice == ALL else choice


def _explain_missing(names: Sequence[str]) -> None:
    asked = st.session_state.get("run") or st.query_params.get("run")
    if asked is not None and asked not in names:
        st.warning(f"No run named {code(str(asked), 80)} in the store (deleted or renamed?). Showing the newest one.")


__all__ = [
    "ALL",
    "Chosen",
    "choose",
    "choose_domain",
    "choose_flag",
    "choose_number",
    "choose_phase",
    "choose_run",
    "choose_share",
    "choose_size",
    "choose_some",
    "code",
    "domain_of",
    "plain",
    "show_run",
    "theme",
]
