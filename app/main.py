"""The dashboard's entry: the sidebar with the run selection, and the pages in order.

Streamlit runs this file from top to bottom on every interaction; pages are files in ``views/``.
"""

from __future__ import annotations

import streamlit as st

from app import data, state
from app.components import header
from app.views import PAGES
from moescope import __version__


def main() -> None:
    """Draw the sidebar and the chosen page."""
    # The icon is an emoji: a Material icon here would be fetched from the network as the favicon.
    st.set_page_config(page_title="moescope", page_icon="🔭", layout="wide", initial_sidebar_state="expanded")
    pages = [
        st.Page(page.file, title=page.title, icon=page.icon, url_path=page.url, default=index == 0)
        for index, page in enumerate(PAGES)
    ]
    chosen_page = st.navigation(pages, expanded=True)
    with st.sidebar:
        chosen = state.choose_run(data.entries())
        if chosen is not None:
            _about(chosen)
        st.caption(f"moescope {__version__}")
    if chosen is None:
        header.empty_store([str(path) for path in data.store_directories()])
        return
    chosen_page.run()


def _about(chosen: state.Chosen) -> None:
    from moescope.errors import MoescopeError

    try:
        run = data.open_run(chosen.entry.path)
        header.badge(run.badge)
        st.caption(f"{state.plain(run.info.model)} · {run.info.tokens:,} tokens · {run.info.sequences:,} sequences")
    except MoescopeError:
        st.badge("cannot be read", color="red")


if __name__ == "__main__":
    main()
