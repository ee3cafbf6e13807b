"""Pages on a remote store: one listing for many reruns, a fetch that is shown, and errors as a line on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from app.commands.delivery import push
from store import Catalog
from store.remote import listings, mirror
from store.remote.objects import Objects
from store.remote.refusals import Unreachable
from tests.app import synthetic

MAIN = Path(__file__).parents[2] / "app" / "main.py"


def _run(app: AppTest) -> AppTest:
    app.run()
    assert not app.exception
    return app


def test_a_page_fetches_once_shows_that_it_does_and_says_what_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}/runs"
    monkeypatch.setenv("MOESCOPE_CACHE", str(tmp_path / "elsewhere"))
    push(Catalog(url), str(synthetic.finished(tmp_path / "made", "mine")))
    push(Catalog(url), str(synthetic.finished(tmp_path / "made", "second")))
    monkeypatch.setenv("MOESCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOESCOPE_STORE", f"{tmp_path / 'made' / 'none'}:{url}")
    mirror._mirrors.clear()
    listed: list[str] = []
    spun: list[str] = []
    listing, spinner = Objects.listing, st.spinner
    answers = True

    def counted(self: Objects, folder: str = "") -> Any:
        if not answers:
            raise Unreachable(f"{self.url} cannot be listed: the service does not answer")
        listed.append(folder)
        return listing(self, folder)

    monkeypatch.setattr(Objects, "listing", counted)
    monkeypatch.setattr(st, "spinner", lambda text, **others: spun.append(text) or spinner(text, **others))
    app = AppTest.from_file(str(MAIN), default_timeout=60)
    app.query_params["run"] = "mine"
    _run(app)
    assert [title.value for title in app.title] == ["Overview"]
    fetching = [text for text in spun if text.startswith("Fetching")]
    assert len(fetching) == 1 and fetching[0].startswith("Fetching mine, 36") and url.split("/")[-1] in fetching[0]
    asked = len(listed)
    _run(app)
    _run(app)
    assert listed.count("") == 1 and len(listed) == asked

    # The service goes: what is here is shown, with a line that says so; what is not here, is a line on its page.
    answers = False
    found = next(iter(mirror._mirrors.values()))
    monkeypatch.setattr(listings, "KEPT", -1.0)
    _run(app)
    with found.listings._looking:  # the look behind has ended
        pass
    _run(app)
    assert [title.value for title in app.title] == ["Overview"]
    assert "does not answer" in app.sidebar.warning[0].value

    def lost(*_: Any, **__: Any) -> None:
        raise Unreachable("memory://... cannot be read: the service does not answer")

    monkeypatch.setattr(Objects, "fetch", lost)
    app.session_state["run"] = "second"
    _run(app)
    assert [title.value for title in app.title] == ["The run cannot be fetched"]
    assert len(app.error) == 1 and "does not answer" in app.error[0].value
    mirror._mirrors.clear()
    _run(app)
    assert [title.value for title in app.title] == ["The store cannot be read"] and len(app.error) == 1
