"""The section of a page that shows what switching experts off did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import streamlit as st

import store
from app import state
from app.components import chart, table
from app.components.table import Column
from app.exhibits import ablation as exhibits
from app.exhibits.exhibit import Absent
from app.frames import ablation as frames
from moescope.errors import StoreError
from store import Run


def section(run: Run) -> None:
    """The newest ablation beside the run, or another one by choice; without one, the command that makes it."""
    try:
        exhibits.chosen(run, None)
        known = {path: frames.title(store.read_evaluation(path)) for path in _files(run)}
        path = _choose(known)
        document = exhibits.chosen(run, path.stem)
        more, sentence, notes = frames.sentences(document)
        passes, layers, domains = frames.passes(document), frames.layers(document), frames.domains(document)
    except Absent as missing:
        chart.absent(missing)
        return
    except StoreError as error:
        st.error(f"An ablation beside this run cannot be read: {state.plain(str(error), 300)}")
        return
    _verdict(more, sentence)
    chart.exhibit(exhibits.perplexity, run, key="ablation", ablation=path.stem)
    with chart.pair():
        chart.exhibit(exhibits.sinks, run, key="ablation-sinks", ablation=path.stem)
        chart.exhibit(exhibits.residual, run, key="ablation-residual", ablation=path.stem)
    _tables(passes, layers, domains)
    for note in notes:
        st.caption(state.plain(note, 300))


def _files(run: Run) -> list[Path]:
    return store.list_evaluations(run.path, "ablation")


def _choose(known: dict[Path, str]) -> Path:
    paths = list(known)
    if len(paths) == 1:
        return paths[0]
    place = st.selectbox(
        "Experts that were switched off",
        range(len(paths)),
        format_func=list(known.values()).__getitem__,
        key="ablation",
    )
    return paths[min(int(place or 0), len(paths) - 1)]


def _verdict(more: bool | None, sentence: str) -> None:
    text = state.plain(sentence, 400)
    if more is None:
        st.info(text, icon=":material/help:")
    elif more:
        st.warning(text, icon=":material/bolt:")
    else:
        st.info(text, icon=":material/check_circle:")


def _tables(passes: pl.DataFrame, layers: pl.DataFrame, domains: pl.DataFrame) -> None:
    shown: dict[str, Any] = {"passes": _passes, "layers": _layers}
    if len(domains) > 1:
        shown["domains"] = _domains
    frames_of = {"passes": passes, "layers": layers, "domains": domains}
    chosen = state.choose("All figures of", list(shown), key="figures", segmented=True)
    shown[chosen](frames_of[chosen])


def _passes(passes: pl.DataFrame) -> None:
    table.show(
        passes,
        key="ablation-passes",
        alt="Every reading of the text: the unchanged model, the chosen experts, the controls",
        hide=("experts", "seed"),
        columns={
            "what": Column("pass", "text"),
            "switched_off": Column("switched off", "text", width=170),
            "perplexity": Column("perplexity", width=80),
            "low": Column("from", "figure", "lower end of the 95 % interval", width=60),
            "high": Column("to", "figure", "upper end of the 95 % interval", width=60),
            "ratio": Column("ratio", "figure", "perplexity over that of the unchanged model", width=60),
            "ratio_low": Column("ratio from", "figure", "lower end of the 95 % interval of pairs of sequences"),
            "ratio_high": Column("ratio to", "figure", "upper end of the 95 % interval of pairs of sequences"),
            "sink_decay": Column("sink decay", "share", "mean over layers"),
            "residual_max": Column("|hidden state|", "figure", "the largest absolute value"),
            "tokens": Column("predicted tokens", "count"),
        },
    )


def _layers(layers: pl.DataFrame) -> None:
    table.show(
        layers,
        key="ablation-layers",
        alt="Every decoder layer: attention sink and largest hidden state, before and after",
        columns={
            "sink": Column("attention on the first position", "share"),
            "sink_ablated": Column("switched off", "share"),
            "sink_decay": Column("sink decay", "share", "1 - mean over heads of (after / before)"),
            "control_sink_decay": Column("most of any control", "share"),
            "residual_max": Column("largest |hidden state|"),
            "residual_max_ablated": Column("with them switched off"),
            "massive_ablated": Column("massive without them"),
        },
    )


def _domains(domains: pl.DataFrame) -> None:
    table.show(
        domains,
        key="ablation-domains",
        alt="Perplexity per domain, unchanged and with the experts switched off",
        columns={
            "base": Column("perplexity"),
            "ablated": Column("switched off"),
            "ratio": Column("ratio"),
            "tokens": Column("predicted tokens", "count"),
        },
    )
