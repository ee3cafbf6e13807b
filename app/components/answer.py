"""The answer of a section: what it says of this run, in plain words, above its charts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import streamlit as st

from app import data
from app.exhibits.exhibit import Absent
from store import Run


def answer(maker: Callable[..., str], run: Run, **choices: Any) -> None:
    """Draw what ``maker`` says; nothing where the run has nothing to say, since the charts below then say why.

    Args:
        maker: from one of ``app/exhibits/*_answers.py``; returns safe Markdown.
        choices: what ``maker`` is told.
    """
    try:
        words = maker(run, frames=data.frame, **choices)
    except Absent:
        return
    if words:
        st.markdown(words)
