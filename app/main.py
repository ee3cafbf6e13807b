"""The dashboard's entry: the sidebar with the run selection, and the pages in order.

Streamlit runs this file from top to bottom on every interaction; pages are files in ``views/``.
"""

from __future__ import annotations

import streamlit as st

from app import data, focus, state
from app.components import header
from app.components.focus_bar import focus_bar
from app.components.picks import picks
from app.components.theme_watch import theme_watch
from app.sample import remarks
from app.views import PAGES
from moescope import __version__
from moescope.errors import InputError, MoescopeError
from store import Entry, shown

# Seconds between two looks at the store for runs that came or went.
LOOK_EVERY = 3.0


def main() -> None:
    """Draw the sidebar and the chosen page."""
    # The icon is an emoji: a Material icon here would be fetched from the network as the favicon.
    st.set_page_config(page_title="moescope", page_icon="🔭", layout="wide", initial_sidebar_state=236)
    pages = [
        st.Page(page.file, title=page.title, icon=page.icon, url_path=page.url, default=index == 0)
        for index, page in enumerate(PAGES)
    ]
    chosen_page = st.navigation(pages, expanded=True)
    try:
        entries = data.entries()
    except InputError as error:
        header.closed_store(str(error))
        return
    with st.sidebar:
        chosen = state.choose_run(entries)
        for trouble in data.troubles():
            st.warning(f"What was here before is shown: {state.plain(trouble, 300)}")
    if chosen is not None and not _arrived(chosen.entry):
        return
    with st.sidebar:
        if chosen is not None:
            _about(chosen.entry)
            _offer_live(entries, chosen)
        st.caption(f"moescope {__version__}")
        theme_watch()
        _look_for_runs(_names(entries))
    if chosen is None:
        header.empty_store([shown(path) for path in data.store_directories()])
        return
    with st.container(gap=None):
        _focus(chosen.entry)
    focus.drawn()
    chosen_page.run()
    picks()


def _focus(entry: Entry) -> None:
    try:
        focus_bar(data.open_run(entry.path))
    except (MoescopeError, OSError):
        return  # the page says what is wrong with the run


def _arrived(entry: Entry) -> bool:
    """Whether the run is here to be shown; a run of a remote store is fetched first."""
    try:
        data.arrive(entry)
    except MoescopeError as error:
        header.closed_store(str(error), title="The run cannot be fetched")
        return False
    return True


def _about(entry: Entry) -> None:
    try:
        run = data.open_run(entry.path)
        header.badge(run.badge)
        size = "" if run.live else f" · {run.info.tokens:,} tokens · {run.info.sequences:,} sequences"
        st.caption(state.plain(run.info.model) + size)
        for remark in remarks(run):
            st.caption(remark)
    except (MoescopeError, OSError):
        st.badge("cannot be read", color="red")


def _offer_live(entries: dict[str, Entry], chosen: state.Chosen) -> None:
    """A button for each run that is being collected while another one is shown."""
    for name in [name for name, entry in entries.items() if entry.live and name != chosen.name][:3]:
        st.button(
            f"Watch {state.plain(name)}",
            icon=":material/sync:",
            key=f"watch-{name}",
            help="This run is being collected.",
            on_click=state.show_run,
            args=(name,),
        )


@st.fragment(run_every=LOOK_EVERY)
def _look_for_runs(known: tuple[tuple[str, bool], ...]) -> None:
    """Draw everything again when a run appears, is finished, or goes."""
    try:
        now = _names(data.entries())
    except InputError:
        now = ()
    if now != known:
        st.rerun(scope="app")


def _names(entries: dict[str, Entry]) -> tuple[tuple[str, bool], ...]:
    return tuple(sorted((name, entry.live) for name, entry in entries.items()))


if __name__ == "__main__":
    main()
