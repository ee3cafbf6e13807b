"""What the page Compress is asked: which plan, what all plans share, and a preset with its amount and form."""

from __future__ import annotations

from typing import Any

import polars as pl
import streamlit as st

from app import state
from app.frames import compress_presets as frames
from planner.engines import ENGINES
from store import Run

GIB = 2**30
_FORMS = {
    "default": "the preset's own",
    "uniform": "all layers alike",
    "per_layer": "each layer its own",
    "shared": "the router keeps its rows",
    "padded": "padded to the largest",
    "masked": "zeroed, shapes stay",
    "packed": "packed words",
    "dense": "on grids, type stays",
}
_ENGINES = {"ours": "compressor.load too"} | {
    name: engine.title for name, engine in ENGINES.items() if name != "transformers"
}
ADVISED, PRESET = "advised", "preset"
SHARED = ("share", "memory", "form", "domains", "engine", "guard", "allow_invalid")
"""Arguments of ``planner.make`` that every preset takes."""


def kind() -> str:
    """Which plan is shown: the best for the budget, or a preset's."""
    words = {ADVISED: "the best for the budget", PRESET: "of a preset"}
    return state.choose("Plan", [ADVISED, PRESET], key="plan", segmented=True, words=words.__getitem__)


def common(run: Run) -> dict[str, Any]:
    """What all plans of the page share, as ``planner.make`` takes it; domains as a tuple, so that it can be a key."""
    asked: dict[str, Any] = {}
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        if len(run.domains) > 1:
            domains = state.choose_some("Whose text counts", run.domains, key="domains", none="all domains")
            asked |= {"domains": tuple(domains)} if domains else {}
        with st.container(width=230):
            engine = state.choose("Loaded by", list(_ENGINES), key="engine", words=_ENGINES.__getitem__)
        asked |= {"engine": engine} if engine != "ours" else {}
        with st.container(width="content"):
            asked["guard"] = state.choose_flag(
                "Protect super experts", key="guard", default=True,
                help="Experts whose outputs feed the massive activations; without them a model can break.",
            )  # fmt: skip
        if run.badge.status == "invalid":
            asked["allow_invalid"] = state.choose_flag("Plan all the same", key="allow-invalid", default=False)
    return asked


def preset(run: Run, known: pl.DataFrame) -> dict[str, Any]:
    """Preset, amount and form, as ``planner.make`` takes them. known: ``app.frames.compress_presets.presets``."""
    names = known.filter("here")["preset"].to_list()
    titles = dict(known.select("preset", "title").iter_rows())
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        chosen = state.choose(
            "Preset", names, key="preset", default=frames.first_choice(names), words=titles.__getitem__
        )
        by = state.choose("By", ["share", "memory"], key="by", segmented=True)
        asked: dict[str, Any] = {"preset": chosen}
        if by == "share":
            asked["share"] = state.choose_share("Share to remove", key="share", default=25) / 100
        else:
            asked["memory"] = _memory(run)
        form = state.choose("Stored", list(_FORMS), key="form", words=_FORMS.__getitem__)
        asked |= {"form": form} if form != "default" else {}
    return asked


def _memory(run: Run) -> int:
    most = frames.expert_bytes(run) / GIB
    value = state.choose_size(
        "Experts may take, GiB", key="memory", low=1e-6, high=max(most, 1e-3), default=float(f"{0.75 * most:.4g}"),
        help=f"Weights of all experts, in the type that the run was recorded with; now {most:.3g} GiB. Other weights "
        "of the model come on top.",
    )  # fmt: skip
    return int(value * GIB)
