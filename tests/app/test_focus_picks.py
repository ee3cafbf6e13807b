"""Picking: what the run does not have leaves the focus as it is, and a link moves a focus that holds something else."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs

import pytest
from streamlit.testing.v1 import AppTest
from visiting import visited

HELD = {"layer": "2", "expert": "5"}


def _picking(path: str, picked: dict[str, object]) -> None:
    import streamlit as st

    import store
    from app import focus

    focus.know(store.open_run(path))
    focus.follow_link()
    st.button("pick", on_click=focus.pick, kwargs=picked)


@pytest.mark.parametrize(
    ("picked", "then"),
    [
        ({"layer": "3", "expert": 7}, {"layer": "3", "expert": "7"}),
        ({"layer": "0", "expert": 7}, HELD),  # a decoder layer without experts
        ({"layer": 4}, HELD),
        ({"expert": 16}, HELD),
        ({"expert": "x"}, HELD),
        ({"layer": None, "expert": -1}, HELD),
        ({"layer": "0", "sequence": 1, "token": 9}, {**HELD, "sequence": 1, "token": 9}),
    ],
)
def test_what_the_run_does_not_have_is_not_picked(
    finished_path: Path, picked: dict[str, object], then: dict[str, object]
) -> None:
    tested = AppTest.from_function(_picking, args=(str(finished_path), picked), default_timeout=20)
    for key, value in HELD.items():
        tested.session_state[key] = value
    tested.run()
    tested.button[0].click().run()
    assert not tested.exception
    keys = ("layer", "expert", "sequence", "token")
    assert {key: tested.session_state[key] for key in keys if key in tested.session_state} == then


def test_a_link_moves_a_focus_that_holds_something_else(monkeypatch: pytest.MonkeyPatch, finished_path: Path) -> None:
    app = visited(monkeypatch, finished_path.parent, layer="3", expert="5")
    links = {link.proto.query_string for link in app.get("page_link") if link.proto.label == "Super experts"}
    (query,) = (parse_qs(link) for link in links if link)
    assert query == {"pick": ["layer:2"]}  # no part that is held stands in the address a second time

    tested = AppTest.from_function(_picking, args=(str(finished_path), {}), default_timeout=20)
    tested.session_state["layer"], tested.session_state["expert"] = "3", "5"
    tested.query_params["pick"] = query["pick"][0]
    tested.run()
    assert not tested.exception and (tested.session_state["layer"], tested.session_state["expert"]) == ("2", "5")
    assert "pick" not in tested.query_params
    tested.query_params["pick"] = "layer:<b>,expert:99,run:other,nonsense"
    tested.run()
    assert not tested.exception and (tested.session_state["layer"], tested.session_state["expert"]) == ("2", "5")

    fresh = visited(monkeypatch, finished_path.parent, pick="layer:2,expert:5")  # the link in a window of its own
    assert (fresh.session_state["layer"], fresh.session_state["expert"]) == ("2", "5")
