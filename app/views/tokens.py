"""Tokens: the text of one sequence, every token coloured by what the router did there. Reads one part of it only."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import polars as pl
import streamlit as st

from app import data, focus, state
from app.components import chart, header, table, token_colouring, token_find
from app.components.page import render
from app.components.sections import sections
from app.components.token_colouring import Colouring
from app.components.token_find import Finding
from app.components.token_part import token_part
from app.components.token_strip import token_strip
from app.exhibits import tokens as exhibits
from app.exhibits.absent import require
from app.exhibits.exhibit import Absent
from app.frames import token_find as finding_frames
from app.frames import token_flips, token_measures, tokens
from app.frames.token_measures import Measured
from app.frames.token_routes import Routes
from moescope.errors import MoescopeError
from store import Run

_READ_EXPERT = (
    "The most frequent first choices of this part have a colour each: long stretches of one colour mean that "
    "neighbouring tokens share their first expert."
)


def page(run: Run) -> None:
    """Draw the page."""
    header.title(
        "Tokens", run, what="Which experts does each token of a text use, and how decided was the router there?"
    )
    try:
        require("The experts of single tokens", run, "trace", "order")
    except Absent as missing:
        chart.absent(missing)
        return
    if not run.layers or run.table("sequence").is_empty():
        st.info("No sequence has been recorded yet.", icon=":material/hourglass_top:")
        return
    others = [] if run.live else sorted(n for n, one in data.entries().items() if n != run.name and not one.live)
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        domain = state.choose_domain(run.domains)
        ways = token_find.ways(run, others)
        default = "text" if "text" in ways else ways[0]  # a word is two clicks away
        way = state.choose("Find", ways, key="find", default=default, words=token_find.WAYS.__getitem__)
        mode = token_colouring.choose(run, others)
        colouring = token_colouring.options(run, mode)
        other = token_colouring.other_run(run, others, wanted="flip" in mode or way == "flips")
    finding = token_find.find(run, way=way, domain=domain, other=lambda: other)
    sequence = _sequence(run, domain, finding)
    if sequence is None:
        return
    _about(run, sequence)
    _text(run, sequence, colouring, finding, other)


def _sequence(run: Run, domain: str | None, finding: Finding) -> int | None:
    """The focused sequence, or the first that was found; of a number that the domain lacks, the next that it has."""
    asked = focus.current().sequence
    if asked is None and finding.found is not None and len(finding.found):
        return int(finding.found["sequence"].item(0))
    numbers = data.frame(tokens.sequences, run, domain=domain)["sequence"]
    if numbers.is_empty():
        st.info("No sequence has been recorded in this domain yet.", icon=":material/hourglass_top:")
        return None
    later = numbers.filter(numbers >= (asked or 0))
    return int((later if len(later) else numbers.tail(1)).item(0))


def _about(run: Run, sequence: int) -> None:
    row = data.frame(tokens.sequences, run).filter(pl.col("sequence") == sequence).row(0, named=True)
    source = (row["source"] or "").rsplit("/", 1)[-1]
    where = f" · from {state.plain(source)}" if source else ""
    prompt = row["prompt_tokens"]
    made = f" · {row['tokens'] - prompt:,} generated" if prompt is not None and prompt < row["tokens"] else ""
    st.caption(f"Sequence {sequence} · {state.plain(row['domain'])} · {row['tokens']:,} tokens{made}{where}")
    if not run.info.text_kept:
        reason = run.omissions.get("text")
        words = "This run keeps no text, so tokens show their positions. Collect without `--no-text` to read them here."
        if reason:
            why = state.plain(reason.rstrip("."), 300)
            words = f"The text of the tokens cannot be computed from what was imported: {why}."
        st.info(words, icon=":material/visibility_off:")


def _text(run: Run, sequence: int, colouring: Colouring, finding: Finding, other: Run | None) -> None:
    length = int(data.frame(tokens.sequences, run).filter(pl.col("sequence") == sequence)["tokens"].item(0))
    selected = _selected(length)
    first = token_part(length, sequence, selected)
    last = min(first + tokens.PART, length) - 1
    text = data.detail(tokens.sequence_tokens, run, sequence=sequence, first=first, last=last)
    routes: Routes = data.large(tokens.routes, run, sequence=sequence, first=first, last=last)
    if text.is_empty() or not routes.count or (routes.ids < 0).all():
        words = "No selections have been recorded for this part."
        if not run.live and not run.has_trace:
            words = "This run holds counts alone, no selection token by token (`--no-trace`, or imported counts)."
        st.info(words, icon=":material/hourglass_top:")
        return

    @cache
    def there() -> tuple[Run, int] | None:
        return _there(run, other, sequence, colouring.label)

    measured: Measured | None = None
    try:
        measured = token_colouring.measured(run, routes, colouring, sequence=sequence, other=there)
    except Absent as missing:
        chart.absent(missing)
    except MoescopeError as error:
        st.info(state.plain(str(error), 400), icon=":material/visibility_off:")
    colours = token_measures.of_first(routes, colouring.label) if measured is None else measured.frame
    marks, marked = _marks(run, sequence, routes, colouring, finding, measured, there)
    token_strip(
        text, routes, colours, layer=colouring.label, mode="expert" if measured is None else colouring.mode,
        selected=selected, on_select=partial(_keep, sequence), marks=marks, marked=marked, total=length,
        measure=None if measured is None else measured.measure,
    )  # fmt: skip
    chart.caption(
        (_READ_EXPERT if measured is None else measured.measure.note)
        + f" Thinly underlined: the same first expert as under the pointer. `{tokens.SPLIT}` is a part of a character.",
        colours.join(text.select("position", "text"), on="position", how="left"),
        None,
        key=f"tokens-{sequence}-{first}",
    )
    _along(run, sequence, first, colouring, measured)
    if selected is not None and routes.start <= selected < routes.start + routes.count:
        _route_of(routes, selected)


def _marks(
    run: Run,
    sequence: int,
    routes: Routes,
    colouring: Colouring,
    finding: Finding,
    measured: Measured | None,
    there: Any,
) -> tuple[list[int], str]:
    """The positions that are underlined, and why."""
    first, last = routes.start, routes.start + routes.count - 1
    if finding.way == "text" and finding.found is not None:
        wanted = {"wanted": finding.wanted, "regex": finding.regex}
        return data.large(finding_frames.text_marks, run, sequence=sequence, first=first, last=last, **wanted), "found"
    if finding.way == "expert":
        mine = (routes.of(colouring.label)[0] == colouring.expert).any(axis=1)
        return [first + int(at) for at in mine.nonzero()[0]], f"uses expert {colouring.expert}"
    if colouring.mode == "flip" and measured is not None:
        changed = measured.frame.filter(pl.col("value") > 0)
        return changed["position"].to_list(), "flipped"
    if finding.way == "flips" and (pair := there()) is not None:
        theirs = data.large(tokens.routes, pair[0], sequence=pair[1], first=first, last=last)
        values = token_flips.flips(run, pair[0], routes, theirs, labels=[colouring.label])
        return [first + int(at) for at in (values > 0).nonzero()[0]], "flipped"
    return [], ""


def _there(run: Run, other: Run | None, sequence: int, label: str) -> tuple[Run, int] | None:
    """The other run, and the sequence of the same text in it."""
    if other is None:
        return None
    found = data.frames_of_two(token_flips.sequences, run, other, label=label)["sequences"]
    row = found.filter(pl.col("sequence") == sequence)
    if row.is_empty():
        st.info(f"{state.code(other.name)} does not hold the text of sequence {sequence}.")
        return None
    return other, int(row["other_sequence"].item(0))


def _selected(length: int) -> int | None:
    """The kept token; None when there is none or it lies outside the sequence."""
    value = focus.current().token
    return value if value is not None and value < length else None


def _keep(sequence: int) -> None:
    """After a click in the strip: the token is the focus."""
    position = getattr(st.session_state.get("strip"), "selected", None)
    if isinstance(position, int):
        focus.pick(sequence=sequence, token=position)


def _along(run: Run, sequence: int, first: int, colouring: Colouring, measured: Measured | None) -> None:
    def experts() -> None:
        chart.exhibit(
            exhibits.experts_along, run, key=f"experts-{sequence}-{first}", sequence=sequence, start=first,
            layer=colouring.label,
        )  # fmt: skip

    def measure() -> None:
        assert measured is not None
        made = exhibits.of_measured(measured, sequence=sequence, theme=state.theme(), noted=False)
        key = f"{colouring.mode}-{sequence}-{first}"
        chart.show(made.figure, made.frame, key=key, read=made.read, alt=made.alt, rests_on=made.rests_on)

    sections({"Experts": experts} if measured is None else {"Measure": measure, "Experts": experts})


def _route_of(routes: Routes, position: int) -> None:
    st.subheader(f"Experts of the token at position {position}", anchor=False)
    at = position - routes.start
    one = Routes(position, routes.layers, routes.ids[:, at : at + 1], routes.weights[:, at : at + 1])
    table.show(
        tokens.route_table(one.frame()),
        key=f"token-{position}",
        alt=f"Experts of the token at position {position} in every layer",
        read="Gate weights in brackets. A row picks its layer.",
    )


if __name__ == "__main__":
    render(page)
