"""Every exhibit by name. A new one is a function in a module beside this one and an ``Entry`` in its ``EXHIBITS``;
a new module is one line in ``MODULES``, in the order of the pages. A page may hold exhibits of its own: see
``app/views/__init__.py``.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import store
from app.exhibits.choices import checked
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures.style import Theme
from app.views import PAGES
from moescope.errors import InputError

MODULES = (
    "coverage",
    "routing",
    "specialization",
    "flow",
    "architecture",
    "axes",
    "tokens",
    "expert",
    "super_experts",
    "ablation",
    "local_consistency",
    "similarity",
    "comparison",
    "timeline",
    "compress",
    "compress_plan",
    "caching",
    "placement",
    "what_if",
    "sweep",
    "sweep_studies",
    "what_if_more",
)


@cache
def entries() -> dict[str, Entry]:
    """All exhibits by name, in the order of the pages."""
    found: dict[str, Entry] = {}
    of_pages = [f"app.views.{Path(page.file).stem}" for page in PAGES if page.exhibits]
    for name in [*(f"app.exhibits.{name}" for name in MODULES), *of_pages]:
        for entry in import_module(name).EXHIBITS:
            assert entry.name not in found, f"two exhibits are named {entry.name}"
            found[entry.name] = entry
    return found


def entry(name: str) -> Entry:
    """The exhibit of that name.

    Raises:
        InputError: there is none; the message names near ones.
    """
    known = entries()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"no figure {name!r}; {hint}")
    return known[name]


def make(
    name: str, run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", choices: dict[str, Any] | None = None
) -> Exhibit:
    """The exhibit of that name, drawn from a run.

    Args:
        choices: by name, as text or as what they are; checked against the exhibit and the run.

    Raises:
        InputError: no such exhibit, a choice that it does not have, or a value that the run lacks.
        Absent: the run cannot fill it.
    """
    found = entry(name)
    return found.make(run, frames=frames, theme=theme, **checked(found, run, choices or {}))


__all__ = ["Absent", "Entry", "Exhibit", "Frames", "entries", "entry", "fresh", "make"]
