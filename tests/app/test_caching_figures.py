"""Tables and figures of a caching study: what they draw, in both themes, and that text cannot become markup."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl
import pytest
import synthetic

import store
from app.figures import caching as figures
from app.figures import caching_token, caching_ways
from app.figures.style import Theme
from app.frames import caching as frames
from app.frames import caching_token as token_frames
from planner.cache.study import Study

ASKED: dict[str, Any] = {"name": "rtx4090", "vram": 2**20, "context": 64, "batch": 1, "other_weights": 2**18}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.finished(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def found(path: Path) -> Study:
    with store.open_run(path) as run:
        return frames.answer(run, **ASKED)


@pytest.fixture(scope="module")
def clock(path: Path) -> token_frames.Clocked:
    with store.open_run(path) as run:
        return token_frames.clocked(run, way="lru", **ASKED)


def drawn(found: Study, clock: token_frames.Clocked, theme: Theme) -> list[go.Figure]:
    """Every figure."""
    each = found.slots / found.layers
    return [
        figures.hit_rate_curves(frames.hit_rates(found), each=each, theme=theme),
        figures.hit_rate_parts(frames.parts(found), each=each, theme=theme),
        figures.time_by_memory(frames.times(found), asked=1e5, resident=found.resident_ms, theme=theme),
        caching_ways.ways(frames.ways(found), bound=found.bound_ms, theme=theme),
        caching_ways.domain_times(frames.domains(found), theme=theme),
        caching_ways.domain_hits(frames.domains(found), theme=theme),
        caching_token.token(token_frames.events(clock, 3), title="Token", theme=theme),
    ]


def trace(figure: go.Figure, name: str) -> Any:
    return next(one for one in figure.data if one.name == name)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_says_what_it_shows(found: Study, clock: token_frames.Clocked, theme: Theme) -> None:
    for figure in drawn(found, clock, theme):
        assert figure.layout.title.text
        assert figure.layout.xaxis.title.text
        names = [one.name for one in figure.data if one.showlegend is not False]
        assert len(names) == len(set(names))  # no entry of the legend twice
        json.dumps(figure.to_plotly_json(), default=str)


def test_hit_rates_are_those_of_the_study(found: Study) -> None:
    figure = figures.hit_rate_curves(frames.hit_rates(found), each=7.5)
    for policy, words in {**figures.POLICIES, **figures.BOUNDS}.items():
        rates = [one.rate for one in found.curves if (one.policy, one.control) == (policy, "observed")]
        assert list(trace(figure, words).y) == pytest.approx(rates, abs=1e-12)
    assert [shape.x0 for shape in figure.layout.shapes] == [7.5]
    # Two bands: LRU and the static set have intervals.
    assert sum(one.fill == "tonexty" for one in figure.data) == 2


def test_the_parts_sum_to_the_hit_rate(found: Study) -> None:
    figure = figures.hit_rate_parts(frames.parts(found), each=found.slots // found.layers)
    for place, policy in enumerate(("lru", "static")):
        whole = sum(bar.x[place] for bar in figure.data)
        (rate,) = [
            one.rate for one in found.curves
            if (one.policy, one.control, one.slots) == (policy, "observed", found.slots // found.layers)
        ]  # fmt: skip
        assert whole == pytest.approx(rate, abs=1e-9)


def test_ways_stand_in_the_order_of_their_times(found: Study) -> None:
    frame = frames.ways(found)
    assert frame["ms"].is_sorted()
    figure = caching_ways.ways(frame, bound=found.bound_ms)
    assert list(figure.layout.yaxis.categoryarray)[::-1] == frame["short"].to_list()
    with_trace = trace(figure, "by the trace")
    assert len(with_trace.y) == frame["needs_trace"].sum()
    widths = [high - ms for high, ms, needs in frame.select("high", "ms", "needs_trace").iter_rows() if needs]
    assert list(with_trace.error_x.array) == pytest.approx(widths, abs=1e-15)
    assert min(frame["ms"]) >= found.bound_ms


def sizes(*flags: bool) -> pl.DataFrame:
    return pl.DataFrame({"bytes": [100 * (place + 1) for place in range(len(flags))], "pays": flags})


@pytest.mark.parametrize(
    ("flags", "stretches"),
    [
        ((False, False), []),
        ((False, True, True, False), [(200.0, 300.0)]),
        ((False, True, False), [(150.0, 250.0)]),  # one size alone: half-way to its neighbours
        ((True, False, False, True), [(100.0, 150.0), (350.0, 400.0)]),
    ],
)
def test_where_caching_pays(flags: tuple[bool, ...], stretches: list[tuple[float, float]]) -> None:
    assert figures.paying(sizes(*flags)) == stretches


def test_times_are_shaded_where_it_pays_and_stand_on_a_log_axis_where_they_differ_much(found: Study) -> None:
    frame = frames.times(found).with_columns(pays=pl.Series([True] * len(found.points)))
    figure = figures.time_by_memory(frame, asked=2.0**17, resident=found.resident_ms)
    band, line = figure.layout.shapes
    unit = line.x0 / 2.0**17
    assert (band.x0, band.x1) == pytest.approx((frame["bytes"].min() * unit, frame["bytes"].max() * unit))
    assert trace(figure, "shaded: caching pays") is not None
    assert figure.layout.yaxis.type != "log"
    far = frame.with_columns(plain=pl.col("plain") * 100)
    assert figures.time_by_memory(far, asked=1.0, resident=1.0).layout.yaxis.type == "log"
    never = figures.time_by_memory(frame.with_columns(pays=pl.lit(False)), asked=1.0, resident=1.0)
    assert len(never.layout.shapes) == 1
    assert "shaded: caching pays" not in [one.name for one in never.data]


def test_a_token_ends_when_the_clock_says(clock: token_frames.Clocked) -> None:
    seconds = clock.served.clock.pass_seconds
    marked = token_frames.marks(clock)
    assert seconds[marked["slowest"]] == seconds.max() and seconds[marked["fastest"]] == seconds.min()
    assert seconds[marked["fastest"]] <= seconds[marked["typical"]] <= seconds[marked["slow"]]
    for at in marked.values():
        frame = token_frames.events(clock, at)
        assert frame["end_ms"].max() == pytest.approx(1e3 * seconds[at], abs=1e-9)
        assert token_frames.place_of(clock, at)[3] == pytest.approx(1e3 * seconds[at], abs=1e-12)
        figure = caching_token.token(frame, title="Token")
        assert sum(len(bar.x) for bar in figure.data) == len(frame)
        assert len(figure.layout.shapes) == len(clock.layers)
    work = clock.setting.test
    first = int(work.offsets[1])
    assert token_frames.place_of(clock, first)[:3] == (int(work.sequences[1]), 0, work.domains[1])


def test_domain_names_cannot_become_markup(found: Study) -> None:
    hostile = replace(found, domains=tuple(replace(one, domain=synthetic.HOSTILE) for one in found.domains)[:1])
    for figure in (
        caching_ways.domain_times(frames.domains(hostile)),
        caching_ways.domain_hits(frames.domains(hostile)),
    ):
        assert "<script" not in json.dumps(figure.to_plotly_json(), default=str)


@pytest.mark.parametrize(
    "draw",
    [
        lambda frame: figures.hit_rate_curves(frame, each=1.0), lambda frame: figures.hit_rate_parts(frame, each=1.0),
        lambda frame: figures.time_by_memory(frame, asked=1.0, resident=1.0),
        lambda frame: caching_ways.ways(frame, bound=1.0), caching_ways.domain_times,
        caching_ways.domain_hits, lambda frame: caching_token.token(frame, title="Token"),
    ],
)  # fmt: skip
def test_nothing_to_draw_is_a_sentence(draw: Callable[[pl.DataFrame], go.Figure]) -> None:
    figure = draw(pl.DataFrame())
    assert not figure.data
    assert figure.layout.annotations[0].text


def test_tables_for_the_terminal(found: Study) -> None:
    told = frames.told(found)
    assert len(told) == len(found.ways)
    assert told["way"].to_list() == [frames.short(one) for one in found.ways]
    assert frames.told_times(found)["pays"].to_list() == ["yes" if one.pays else "no" for one in found.points]
    assert sum(frames.memory(found).values()) == pytest.approx(found.memory["total"])


def test_half_of_the_experts_fit_at_first(path: Path) -> None:
    with store.open_run(path) as run:
        asked = {name: ASKED[name] for name in ("context", "batch", "other_weights")}
        for bits in (None, 4):
            vram = frames.half(run, bits=bits, **asked)
            given = frames.answer(run, name="rtx4090", vram=vram, bits=bits, **asked)
            assert given.slots == given.all_slots // 2
