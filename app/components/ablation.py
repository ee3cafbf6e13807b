"""The section of a page that shows what switching experts off did."""

from __future__ import annotations

import shlex

import polars as pl
import streamlit as st

from app import state
from app.components import chart
from app.figures import ablation as figures
from app.frames import ablation as frames
from moescope.errors import StoreError
from store import Run


def section(run: Run, *, rule: str | None) -> None:
    """The newest ablation beside the run, or another one by choice; without one, the command that makes it.

    rule: the rule by which the run has super experts; None where no rule names any.
    """
    st.subheader("What happens when they are switched off", anchor=False)
    try:
        documents = frames.documents(run)
        titles = [frames.title(document) for document in documents]
    except StoreError as error:
        st.error(f"The ablations beside this run cannot be read: {state.plain(str(error), 300)}")
        return
    if not documents:
        _how_to(run, rule)
        return
    place = 0
    if len(documents) > 1:
        place = st.selectbox(
            "Experts that were switched off", range(len(documents)), format_func=titles.__getitem__, key="ablation"
        )
    document = documents[min(int(place or 0), len(documents) - 1)]
    try:
        more, sentence, notes = frames.sentences(document)
        passes, layers, domains = frames.passes(document), frames.layers(document), frames.domains(document)
    except StoreError as error:
        st.error(state.plain(str(error), 300))
        return
    _verdict(more, sentence)
    _charts(passes, layers)
    if len(domains) > 1:
        _domains(domains)
    with st.expander("All figures: every pass, and every layer"):
        _tables(passes, layers)
    for note in notes:
        st.caption(state.plain(note, 300))


def _how_to(run: Run, rule: str | None) -> None:
    st.info(
        "Nobody has switched experts off yet. This sets the down_proj of chosen experts to zero without telling the "
        "router, and measures the perplexity on held-out text beside two kinds of controls.",
        icon=":material/power_off:",
    )
    name = shlex.quote(str(run.path))
    which = f"--experts LAYER:EXPERT,... --beside {name}" if rule is None else f"--super-experts {name}"
    which += " --rule code" if rule == "code" else ""
    st.code(f"moescope ablate MODEL {which} --data PATH", language="bash")


def _verdict(more: bool | None, sentence: str) -> None:
    text = state.plain(sentence, 400)
    if more is None:
        st.info(text, icon=":material/help:")
    elif more:
        st.warning(text, icon=":material/bolt:")
    else:
        st.info(text, icon=":material/check_circle:")


def _charts(passes: pl.DataFrame, layers: pl.DataFrame) -> None:
    theme = state.theme()
    tokens = int(passes["tokens"].max() or 0)  # type: ignore[arg-type]
    chart.show(
        figures.perplexity_ratios(passes, theme=theme),
        passes,
        key="ablation",
        read="Each mark is one reading of the same text with other experts switched off; 1 is the unchanged model. The "
        "chosen experts matter if their mark lies clear of all controls: as many random experts, and as many of the "
        "same layers.",
        rests_on=f"{tokens:,} predicted tokens; unchanged perplexity {passes['perplexity'][0]:,.4g}; 95 % intervals of "
        "pairs of sequences.",
        alt="Perplexity ratios of the chosen experts and of every control",
    )
    with chart.pair():
        chart.show(
            figures.sinks_before_and_after(layers, theme=theme),
            layers,
            key="ablation-sinks",
            read="Attention that falls on position 0. Where the experts feed an attention sink, the dashed line drops; "
            "hover for the decay, and for that of the controls.",
            rests_on=_decay(layers),
            alt="Attention on the first position per layer, before and after",
        )
        chart.show(
            figures.residual_before_and_after(layers, theme=theme),
            layers,
            key="ablation-residual",
            read="Where the experts make the massive activations, the dashed line stays far below. Diamonds mark "
            "layers above 100 and 1,000 times the median.",
            alt="Largest hidden state per layer, before and after",
        )


def _decay(layers: pl.DataFrame) -> str:
    seen = layers.filter(pl.col("sink_decay").is_not_null())
    if seen.is_empty():
        return ""
    top = seen.sort("sink_decay").row(-1, named=True)
    beside = top["control_sink_decay"]
    controls = "" if beside is None else f", at most {beside:.1%} for any control there"
    return f"Largest decay {top['sink_decay']:.1%} in layer {top['layer']}{controls}."


def _tables(passes: pl.DataFrame, layers: pl.DataFrame) -> None:
    number = st.column_config.NumberColumn
    figure = {name: number(format="%.4g") for name in ("perplexity", "low", "high", "ratio", "ratio_low", "ratio_high")}
    st.dataframe(
        passes.drop("experts"),
        hide_index=True,
        alt="Every reading of the text: the unchanged model, the chosen experts, the controls",
        column_config={
            **figure,
            "what": "pass",
            "switched_off": "switched off",
            "sink_decay": number("sink decay", format="percent", help="mean over layers"),
            "residual_max": number("largest |hidden state|", format="%.4g"),
        },
    )
    share = {
        "sink": number("attention on the first position", format="percent"),
        "sink_ablated": number("switched off", format="percent"),
        "sink_decay": number("sink decay", format="percent", help="1 - mean over heads of (after / before)"),
        "control_sink_decay": number("most of any control", format="percent"),
    }
    st.dataframe(
        layers,
        hide_index=True,
        alt="Every decoder layer: attention sink and largest hidden state, before and after",
        column_config={
            **share,
            "residual_max": number("largest |hidden state|", format="%.4g"),
            "residual_max_ablated": number("with them switched off", format="%.4g"),
            "massive_ablated": st.column_config.CheckboxColumn("massive without them"),
        },
    )


def _domains(domains: pl.DataFrame) -> None:
    number = st.column_config.NumberColumn
    st.dataframe(
        domains,
        hide_index=True,
        alt="Perplexity per domain, unchanged and with the experts switched off",
        column_config={
            "base": number("perplexity", format="%.4g"),
            "ablated": number("switched off", format="%.4g"),
            "ratio": number("ratio", format="%.4g"),
            "tokens": number("predicted tokens", format="localized"),
        },
    )
