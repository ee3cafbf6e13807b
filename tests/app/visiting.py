"""The dashboard without a browser: a page drawn by Streamlit's own test runner, and the words on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

MAIN = Path(__file__).parents[2] / "app" / "main.py"
SECONDS = 100


def visited(
    monkeypatch: pytest.MonkeyPatch, directory: Path, view: str = "", section: str = "", **parameters: str | list[str]
) -> AppTest:
    """A page of a store, drawn; view: its file, without one the first page; section: of the page, without one its
    first; parameters: of its address.
    """
    app = AppTest.from_file(str(MAIN), default_timeout=SECONDS)
    if view:  # pages have their names after a first run only: of an empty store, since that takes no time
        monkeypatch.setenv("MOESCOPE_STORE", str(directory / "no runs"))
        app.run().switch_page(f"views/{view}.py")
    monkeypatch.setenv("MOESCOPE_STORE", str(directory))
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception[0].message
    return open_section(app, section) if section else app


def open_section(app: AppTest, name: str) -> AppTest:
    """The same page with another section drawn."""
    app.session_state["section"] = name
    app.run()
    assert not app.exception, app.exception[0].message
    return app
