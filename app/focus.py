"""What the user looks at: a layer, an expert, a sequence and a token, the same on every page and in the address.

The bar on top of every page holds them as widgets bound to the address; a click in a chart, a table or a text sets
them through :func:`pick`. None means that nothing is chosen: pages then show their own first layer or expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import streamlit as st

from app.frames.axes import layer_labels
from store import Run

KEYS = ("layer", "expert", "sequence", "token")
_DRAWN, _KNOWN, _LINK = "focus-drawn", "focus-known", "pick"


@dataclass(frozen=True)
class Focus:
    """What is chosen; ``layer`` by its label ("3", or "2.1" where a layer has steps), the others by number."""

    layer: str | None = None
    expert: int | None = None
    sequence: int | None = None
    token: int | None = None

    def layer_in(self, run: Run) -> str:
        """The chosen layer, or the run's first."""
        return self.layer if self.layer is not None else layer_labels(run)[0]

    def expert_in(self, run: Run) -> int:
        """The chosen expert, or 0 where none is chosen or the layer has fewer."""
        return self.expert if self.expert is not None and self.expert < experts_of(run, self.layer_in(run)) else 0


def current() -> Focus:
    """The focus as the bar's widgets hold it."""
    state = st.session_state
    expert = state.get("expert")
    return Focus(
        layer=state.get("layer"),
        expert=int(expert) if expert is not None else None,
        sequence=state.get("sequence"),
        token=state.get("token"),
    )


def experts_of(run: Run, label: str | None) -> int:
    """The number of routed experts of a layer; of the largest layer for None."""
    counts = dict(zip(layer_labels(run), (layer.num_experts for layer in run.layers), strict=True))
    return max(counts.values(), default=0) if label is None else counts.get(label, 0)


def know(run: Run) -> None:
    """Say which run can be picked from: what it does not have is not picked."""
    st.session_state[_KNOWN] = dict(zip(layer_labels(run), (layer.num_experts for layer in run.layers), strict=True))


def pick(**chosen: Any) -> None:
    """Set parts of the focus; only from a callback, before the widgets are drawn.

    What the run does not have leaves the focus as it is, such as a decoder layer without experts.
    """
    typed = {key: _typed(key, chosen[key]) for key in KEYS if chosen.get(key) is not None}
    found = {key: value for key, value in typed.items() if value is not None}
    known: dict[str, int] | None = st.session_state.get(_KNOWN)
    if known is not None:
        if "layer" in found and found["layer"] not in known:
            found = {key: value for key, value in found.items() if key not in ("layer", "expert")}
        most = known.get(found.get("layer", st.session_state.get("layer")) or "", max(known.values(), default=0))
        if "expert" in found and not 0 <= int(found["expert"]) < most:
            del found["expert"]
    for key, value in found.items():
        st.session_state[key] = value


def asked_by_link(parts: dict[str, str]) -> dict[str, str]:
    """Query parameters of a link that sets parts of the focus that hold something else.

    By its own name a part would stand in the address twice, with the held value first, which would count.
    """
    return {_LINK: ",".join(f"{key}:{value}" for key, value in parts.items())}


def follow_link() -> None:
    """Pick what the link has asked for that led here; before the bar is drawn."""
    if _LINK in st.query_params:
        parts = (part.partition(":") for part in st.query_params[_LINK].split(","))
        del st.query_params[_LINK]
        pick(**{key: value for key, _, value in parts if key in KEYS})


def drawn() -> None:
    """Say that the bar shows the current focus; after it was drawn."""
    st.session_state[_DRAWN] = current()


def moved() -> bool:
    """Whether the focus has changed since the bar was drawn: what runs in a fragment draws the bar no more."""
    return bool(st.session_state.get(_DRAWN, current()) != current())


def _typed(key: str, value: Any) -> Any:
    """As the widget of that key holds it: layers and experts are options and thus text."""
    try:
        return str(value) if key == "layer" else str(int(value)) if key == "expert" else int(value)
    except (TypeError, ValueError, OverflowError):
        return None
