"""Tokens: the text of one sequence, every token coloured by the expert that took it. Reads that sequence only."""

from __future__ import annotations

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, header
from app.components.page import render
from app.components.token_strip import token_strip
from app.figures import tokens as figures
from app.frames import axes, tokens
from store import Run

# Tokens drawn at once; longer sequences are shown in parts.
PART = 768
_MODES = {"expert": "first expert", "weight": "weight of the first expert", "entropy": "entropy of the gate weights"}
_READ = {
    "expert": "One colour per expert of the chosen layer: long stretches of one colour mean that neighbouring "
    "tokens share their first expert.",
    "weight": "The stronger the colour, the larger the first expert's part of the gate weights: it decides nearly "
    "alone.",
    "entropy": "The stronger the colour, the more evenly the gate weights spread over the selected experts.",
}


def page(run: Run) -> None:
    """Draw the page."""
    header.title("Tokens", run, what="Which experts does each token of a text use?")
    if header.omitted("The experts of single tokens", run, "trace", "order"):
        return
    if not run.layers:
        st.info("No layer has been recorded yet.", icon=":material/hourglass_top:")
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain = state.choose_domain(run.domains)
        listed = data.frame(tokens.sequences, run, domain=domain)
        if listed.is_empty():
            st.info("No sequence has been recorded yet.", icon=":material/hourglass_top:")
            return
        sequence = _choose_sequence(listed)
        layer = focus.current().layer_in(run)
        modes = list(_MODES)[:1] if "weights" in run.omissions else list(_MODES)
        mode = state.choose("Colour by", modes, key="colour", words=_MODES.__getitem__)
    chosen = listed.filter(pl.col("sequence") == sequence).row(0, named=True)
    source = (chosen["source"] or "").rsplit("/", 1)[-1]
    where = f" · from {state.plain(source)}" if source else ""
    st.caption(f"{state.plain(chosen['domain'])} · {chosen['tokens']:,} tokens{where}")
    if not run.info.text_kept and not header.omitted("The text of the tokens", run, "text"):
        st.info(
            "This run keeps no text, so tokens show their positions. Collect without `--no-text` to read them here.",
            icon=":material/visibility_off:",
        )
    _sequence(run, sequence, layer=layer, mode=mode)


def _choose_sequence(listed: pl.DataFrame) -> int:
    """A sequence by its number; of a number that the domain lacks, the next one that it has."""
    numbers = listed["sequence"]
    asked = focus.current().sequence or 0
    return int(numbers.filter(numbers >= min(asked, int(numbers[-1])))[0])


def _sequence(run: Run, sequence: int, *, layer: str, mode: str) -> None:
    text = data.detail(tokens.sequence_tokens, run, sequence=sequence)
    routes = data.detail(tokens.token_routes, run, sequence=sequence)
    if text.is_empty() or routes.is_empty():
        st.info("No selections have been recorded for this sequence.", icon=":material/hourglass_top:")
        return
    start = _choose_part(len(text))
    inside = pl.col("position").is_between(start, start + PART - 1)
    shown, shown_routes = text.filter(inside), routes.filter(inside)
    colours = tokens.layer_routes(shown_routes, layer)
    selected = _selected(len(text))
    token_strip(
        shown, shown_routes, colours, layer=layer, mode=mode, selected=selected, on_select=_keep, total=len(text)
    )
    chart.caption(
        f"{_READ[mode]} Underlined: tokens with the same first expert as the one under the pointer. `{tokens.SPLIT}` "
        "is a token that holds only a part of a character.",
        routes.join(text.select("position", "text"), on="position"),
        None,
        key=f"sequence-{sequence}",
    )
    experts = {axes.layer_label(item.layer, item.step): item.num_experts for item in run.layers}[layer]
    chart.show(
        figures.routing_map(shown_routes, layer=layer, num_experts=experts, theme=state.theme()),
        shown_routes.filter(pl.col("label") == layer),
        key=f"map-{sequence}-{layer}",
        read="Each column is a token, each mark an expert it used. Horizontal dashes are experts that stay in use "
        "over many tokens: a cache likes them.",
        rests_on=f"{len(shown):,} tokens of sequence {sequence}.",
        alt=f"Map of experts and positions of layer {layer}",
    )
    if selected is not None:
        _route_of(routes.filter(pl.col("position") == selected), selected, layer=layer)


def _choose_part(length: int) -> int:
    parts = [str(start) for start in range(0, length, PART)]
    if len(parts) < 2:
        return 0
    return int(state.choose("From token", parts, key="part", segmented=True))


def _selected(length: int) -> int | None:
    """The kept token, from the URL or from a click; None when there is none or it lies outside the sequence."""
    value = focus.current().token
    return value if value is not None and value < length else None


def _keep() -> None:
    """After a click in the strip: remember the token, and name it in the URL."""
    strip = st.session_state.get("strip")
    position = getattr(strip, "selected", None)
    if isinstance(position, int):
        focus.pick(token=position)


def _route_of(route: pl.DataFrame, position: int, *, layer: str) -> None:
    st.subheader(f"Experts of the token at position {position}", anchor=False)
    with st.container(horizontal=True, gap="small"):
        for expert in route.filter(pl.col("label") == layer)["expert"].head(16).to_list():
            there = {"layer": layer, "expert": str(expert)}  # the run stays in the address by itself
            st.page_link("views/expert.py", label=f"Layer {layer}, expert {expert}", query_params=there)
    wide = tokens.route_table(route)
    st.dataframe(
        wide, hide_index=True, alt=f"Experts of the token at position {position} in every layer", width="content"
    )
    chart.downloads(route, None, key=f"token-{position}")


if __name__ == "__main__":
    render(page)
