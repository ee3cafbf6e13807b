"""Figures: what they draw, that they say it in words, and that text from data cannot become markup."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest

import store
from app.figures import consistency as srp_figures
from app.figures import curves, heatmap, hit_rates, outliers, style
from app.figures import tokens as token_figures
from app.frames import confidence, consistency, domains, load, super_experts, tokens

THEMES: tuple[style.Theme, ...] = ("light", "dark")


def every_figure(run: store.Run, theme: style.Theme) -> Iterator[go.Figure]:
    """Every figure that the pages draw, from one run."""
    loads, maxima = load.expert_load(run), super_experts.output_maxima(run)
    model, rates = consistency.srp_model(run), consistency.hit_rates(run)
    shared = rates.filter(pl.col("scope") == "shared")
    shares = domains.domain_shares(run)
    yield heatmap.load_map(loads, value="relative", theme=theme)
    yield heatmap.load_map(loads, value="share", theme=theme)
    yield heatmap.difference_map(shares.filter(pl.col("domain") == "code"), domain="code", theme=theme)
    yield outliers.output_map(maxima, theme=theme)
    yield outliers.ranked_outputs(maxima, super_experts.thresholds(run), theme=theme)
    yield outliers.residual_curve(super_experts.residual(run), theme=theme)
    yield curves.balance_curves(load.balance(run), theme=theme)
    for quantity in curves.CONFIDENCE_WORDS:
        yield curves.confidence_band(confidence.confidence(run), quantity=quantity, theme=theme)
    yield curves.coverage_band(load.coverage(run), theme=theme)
    yield curves.domain_bars(domains.domain_tokens(run), theme=theme)
    yield curves.specialization_curves(domains.specialization(run), domains=run.domains, theme=theme)
    yield srp_figures.srp_curve(model, consistency.published_srp(), theme=theme)
    yield srp_figures.router_size_curve(model, theme=theme)
    yield srp_figures.srp_layer_curves(consistency.srp_layers(run), theme=theme)
    yield srp_figures.srp_expert_scatter(consistency.srp_experts(run), theme=theme)
    yield srp_figures.srp_map(
        consistency.srp_experts(run).filter(pl.col("segment_length") == 16), length=16, theme=theme
    )
    yield srp_figures.repetition_curves(consistency.repetition(run), theme=theme)
    yield srp_figures.overlap_map(consistency.repetition(run), theme=theme)
    yield hit_rates.hit_rate_curves(shared, segment_length=16, scope_words="one cache", theme=theme)
    yield hit_rates.hit_rate_layers(rates.filter(pl.col("policy") == "lru"), policy="lru", theme=theme)
    yield token_figures.routing_map(tokens.token_routes(run, 1), layer="2", num_experts=16, theme=theme)


@pytest.mark.parametrize("theme", THEMES)
def test_every_figure_has_a_title_axes_and_hover_words(run: store.Run, theme: style.Theme) -> None:
    for figure in every_figure(run, theme):
        title = figure.layout.title.text
        assert title
        axes = list(figure.select_xaxes())
        assert all(axis.title.text for axis in axes), title
        shown = [trace for trace in figure.data if trace.hoverinfo != "skip"]
        assert shown, title
        for trace in shown:
            assert trace.hovertemplate, title
            assert any(letter.isalpha() for letter in trace.hovertemplate.split("<extra>")[0]), title
        assert figure.to_json()


def test_every_figure_says_a_sentence_when_there_is_nothing(run: store.Run) -> None:
    frames = [
        curves.domain_bars(domains.domain_tokens(run).head(0)),
        curves.coverage_band(load.coverage(run).head(0)),
        curves.balance_curves(load.balance(run, phase="decode")),
        heatmap.load_map(load.expert_load(run, phase="decode")),
        outliers.output_map(super_experts.output_maxima(run).head(0)),
        outliers.residual_curve(super_experts.residual(run).head(0)),
        srp_figures.srp_curve(consistency.srp_model(run).head(0)),
        hit_rates.hit_rate_curves(consistency.hit_rates(run).head(0), segment_length=None, scope_words="x"),
        token_figures.routing_map(tokens.token_routes(run, 999), layer="2", num_experts=16),
    ]
    for figure in frames:
        assert not figure.data
        assert figure.layout.annotations[0].text.endswith(".")
        assert figure.layout.title.text


def test_load_map_is_diverging_around_the_uniform_share(run: store.Run) -> None:
    trace = heatmap.load_map(load.expert_load(run), value="relative").data[0]
    assert trace.zmid == 0
    assert trace.zmin == -trace.zmax
    assert trace.z.dtype == np.float32
    assert trace.z.shape == (4, 16)
    share = heatmap.load_map(load.expert_load(run), value="share").data[0]
    np.testing.assert_allclose(np.nansum(share.z, axis=1), 100, rtol=1e-5)


def test_difference_map_is_symmetric(run: store.Run) -> None:
    frame = domains.domain_shares(run).filter(pl.col("domain") == "deutsch")
    trace = heatmap.difference_map(frame, domain="deutsch").data[0]
    assert (trace.zmid, trace.zmin) == (0, -trace.zmax)


def test_output_map_rings_the_super_expert_and_puts_shared_experts_last(run: store.Run) -> None:
    figure = outliers.output_map(super_experts.output_maxima(run))
    heat, ring = figure.data
    assert heat.x[-1] == "shared 0"
    assert (list(ring.x), list(ring.y)) == (["5"], ["2"])
    assert heat.zmax == 3


def test_srp_curve_draws_intervals_controls_and_published_models(run: store.Run) -> None:
    figure = srp_figures.srp_curve(consistency.srp_model(run), consistency.published_srp())
    names = {trace.name for trace in figure.data}
    assert set(srp_figures.CONTROL_WORDS.values()) <= names
    published = next(trace for trace in figure.data if trace.name == "20 published models")
    assert len(set(published.customdata)) == 22
    observed = next(trace for trace in figure.data if trace.name == "this run")
    np.testing.assert_allclose(observed.error_y.array, 0.012)
    np.testing.assert_allclose(observed.error_y.arrayminus, 0.01)


def test_beside_published_puts_this_run_in_its_place(run: store.Run) -> None:
    mine = consistency.srp_model(run).filter(pl.col("segment_length") == 16)
    others = consistency.published_srp().filter(pl.col("segment_length") == 16)
    frame = consistency.among_published(mine, others, name="<i>mine</i>")
    figure = hit_rates.beside_published(frame, this="<i>mine</i>", title="t", x="SRP")
    assert list(figure.data[1].y) == ["<b>&lt;i&gt;mine&lt;/i&gt;</b>"]


def test_text_from_data_is_escaped_and_cut() -> None:
    assert style.safe("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;"
    assert len(style.safe("y" * 500)) == 60
    frame = pl.DataFrame({"domain": ["<a href='x'>"], "sequences": [1], "tokens": [5], "share": [1.0]})
    bars = curves.domain_bars(frame).data[0]
    assert "<" not in bars.y[0]


def test_ticks_of_a_log_axis() -> None:
    narrow = style.log_ticks([7, 40])
    assert [tick for tick in narrow["tickvals"] if 4 < tick < 60] == [5.0, 10.0, 20.0, 50.0]
    assert style.log_ticks([])["type"] == "log"
    assert [style.number(value) for value in (0.5, 5000, 20000, 3e6)] == ["0.5", "5000", "20k", "3M"]


def test_a_large_map_stays_small() -> None:
    layers, experts = 94, 384
    grid = pl.DataFrame(
        {"label": np.repeat(np.arange(layers), experts).astype(str), "expert": np.tile(np.arange(experts), layers)}
    )
    frame = grid.with_columns(
        pl.lit(10).alias("tokens"),
        pl.lit(1 / experts).alias("share"),
        pl.lit(1.0).alias("relative"),
        pl.lit(0).alias("step"),
    )
    figure = heatmap.load_map(frame)
    assert figure.data[0].customdata.dtype == np.uint16  # of the hover text: two bytes a cell
    assert set(figure.data[0].customdata.ravel()) == {100}
    assert len(figure.to_json()) < 350_000
