"""The dashboard as it is served: Streamlit behind :class:`app.guard.Guard`. ``streamlit run`` finds ``app`` here."""

from __future__ import annotations

import asyncio
import importlib
import os
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware

from app.guard import Guard
from app.heap import give_back, keep_collections_short

HOSTS_VARIABLE, OPEN_VARIABLE = "MOESCOPE_HOSTS", "MOESCOPE_OPEN"
"""Names that the server answers under, with commas; and the address to open in a browser, empty for none."""


@asynccontextmanager
async def opened(_: st.App) -> AsyncIterator[None]:
    """Open a browser window, where one is asked for. The port is bound before: the browser waits for the answer."""
    keep_collections_short()
    giving = asyncio.create_task(give_back())
    url = os.environ.get(OPEN_VARIABLE)
    if url:
        # Streamlit would open one too, but then asks for an e-mail address in the terminal first.
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    yield
    giving.cancel()


# Plotly looks at what others have imported so far: of two first users at once, one would meet half a module.
importlib.import_module("pandas")

app = st.App(
    Path(__file__).with_name("main.py"),
    lifespan=opened,
    middleware=[Middleware(Guard, hosts=os.environ.get(HOSTS_VARIABLE, "localhost").split(","))],
)
