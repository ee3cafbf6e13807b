"""The ways to another expert: the layer's experts as bars, the one before and after, and those asked for first."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import data, focus, state
from app.components import chart
from app.exhibits import expert as exhibits
from app.frames import expert as frames
from store import Run


def expert_picks(run: Run, where: dict[str, Any]) -> None:
    """Draw them; where: label and expert that the page shows."""
    label, expert = where["label"], where["expert"]
    experts = focus.experts_of(run, label)
    with st.container(horizontal=True, gap="xsmall", vertical_alignment="center"):
        st.markdown(f"**Layer {state.plain(str(label))}, expert {expert}**", width="content")
        _button("", label, (expert - 1) % experts, key="previous", icon=":material/chevron_left:", help="expert before")
        _button("", label, (expert + 1) % experts, key="next", icon=":material/chevron_right:", help="expert after")
        for what, other, detail in data.frame(frames.notable, run, label=label).iter_rows():
            words = f"{what}: **{other}**" if other == expert else f"{what}: {other}"
            _button(words, label, other, key=what.replace(" ", "-"), help=state.plain(detail, 200))
    chart.exhibit(exhibits.experts_of_layer, run, key=f"experts-{label}", layer=label, expert=expert)


def _button(words: str, label: str, expert: int, *, key: str, help: str, icon: str | None = None) -> None:
    st.button(
        words, key=f"pick-{key}", icon=icon, help=help, type="secondary", on_click=focus.pick,
        kwargs={"layer": label, "expert": expert},
    )  # fmt: skip
