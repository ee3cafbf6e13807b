"""Frames and figures of placements: against counting by hand, and that figures say what they draw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
import synthetic

import store
from app.figures import placement as figures
from app.figures.style import Theme
from app.frames import placement as frames
from app.frames.placement import Placed
from planner.placing import place

DEVICES, REDUNDANT = 4, 4
THEMES: tuple[Theme, ...] = ("light", "dark")


@pytest.fixture(scope="module")
def found(run: store.Run) -> Placed:
    """The synthetic run on 4 devices with 4 redundant slots."""
    return frames.placed(run, devices=DEVICES, redundant=REDUNDANT, method="eplb", batch=3)


@pytest.fixture(scope="module")
def counted(run: store.Run, monkeypatch_module: pytest.MonkeyPatch) -> Placed:
    """The same as if only counts were known."""
    monkeypatch_module.setitem(run.__dict__, "has_trace", False)
    return frames.placed(run, devices=DEVICES, redundant=REDUNDANT, method="eplb")


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def later_tokens() -> tuple[np.ndarray, list[str], list[int]]:
    """ids (layers, sequences, tokens, k) of the later requests in the order of replays, their domains, their places.

    Domains take turns: 9 sequences of 3 domains stay in their order, and the first half of 9 is 4 (4.5 to even).
    """
    ids, _ = synthetic.selections(9)
    later = range(4, 9)
    return ids[:, 4:], [synthetic.DOMAINS[one % 3] for one in later], list(range(5))


def test_loads_of_devices_as_experts_lie(found: Placed) -> None:
    ids, _, _ = later_tokens()
    frame = frames.device_loads(found).filter(pl.col("name") == "before")
    for layer, label in enumerate(found.labels):
        expected = np.bincount(ids[layer].reshape(-1) // 4, minlength=4)
        mine = frame.filter(pl.col("label") == label)
        assert mine["load"].to_list() == expected.tolist()
        np.testing.assert_allclose(mine["relative"], expected / expected.mean())


def test_traffic_and_passes_as_experts_lie(found: Placed) -> None:
    ids, _, order = later_tokens()
    device = ids // 4
    home = np.array(order)[None, :, None, None] % DEVICES
    table = {row["name"]: row for row in frames.comparison(found).iter_rows(named=True)}
    before = table["before"]
    assert before["remote"] == pytest.approx((device != home).mean())
    assert before["devices"] == pytest.approx(1 + (device[..., 0] != device[..., 1]).mean())
    differs = device[:-1, ..., :, None] != device[1:, ..., None, :]
    assert before["moves"] == pytest.approx(differs.mean())
    # Batches of 3 requests: requests 0 to 2 run together, then 3 and 4.
    pairs = largest = 0
    spread = []
    for batch in (slice(0, 3), slice(3, 5)):
        for token in range(synthetic.TOKENS):
            loads = [np.bincount(device[layer, batch, token].reshape(-1), minlength=4) for layer in range(4)]
            pairs += sum(map(np.sum, loads))
            largest += sum(map(np.max, loads))
            spread.append(sum(map(np.sum, loads)) / 4 / sum(map(np.max, loads)))
    assert before["per_pass"] == pytest.approx(pairs / 4 / largest)
    histogram = frames.by_pass(found).filter(pl.col("name") == "before")
    assert histogram["passes"].sum() == 160
    np.testing.assert_array_equal(histogram["passes"], np.histogram(spread, bins=50, range=(0, 1))[0])
    sizes = frames.by_size(found).filter(pl.col("name") == "before")
    assert sizes["tokens"].to_list() == [2, 3] and sizes["passes"].to_list() == [80, 80]


def test_what_is_moved(found: Placed) -> None:
    moved, held = frames.movement(found), frames.replicas(found)
    start = [slot % 16 for slot in range(20)]
    for layer, row in enumerate(found.placement.experts.tolist()):
        assert moved["changed"][layer] == sum(one != other for one, other in zip(row, start, strict=True))
        sent = sum(len(set(row[at : at + 5]) - set(start[at : at + 5])) for at in range(0, 20, 5))
        assert moved["copied"][layer] == sent and moved["bytes"][layer] == sent * found.expert_bytes
        mine = held.filter(pl.col("label") == found.labels[layer])
        assert mine["slots"].to_list() == [row.count(expert) for expert in range(16)]
        assert mine["devices"].to_list() == [
            sum(expert in row[at : at + 5] for at in range(0, 20, 5)) for expert in range(16)
        ]
    assert held["share"].sum() == pytest.approx(len(found.labels))
    shown = frames.slots(found)
    assert shown["experts"][0] == " ".join(map(str, found.placement.experts[0, :5].tolist()))
    assert len(shown) == len(found.labels) * DEVICES


def test_domains_and_layers_agree_with_the_verdict(found: Placed) -> None:
    told = found.verdict
    assert told is not None
    frame = frames.domains(found)
    assert frame["domain"].to_list() == sorted(synthetic.DOMAINS)
    assert frame.filter("worst")["domain"].to_list() == [told.worst_domain]
    assert frame["after"].min() == pytest.approx(told.domains[told.worst_domain].pass_balancedness)
    layers = frames.layers(found)
    after = layers.filter(pl.col("name") == "after")
    np.testing.assert_allclose(after["balancedness"], told.after.balancedness().mean(axis=0))
    assert (after["low"] <= after["balancedness"]).all() and (after["high"] >= after["balancedness"]).all()
    assert set(layers["name"]) == set(frames.WORDS)


def test_the_plan_is_that_of_the_planner(run: store.Run, found: Placed) -> None:
    assert found.plan == place(run, devices=DEVICES, redundant=REDUNDANT, method="eplb", batch=3)
    assert found.read is None and found.replicas == REDUNDANT
    part = frames.placed(run, devices=DEVICES, method="lpt", max_tokens=320)
    assert part.read == 320 and part.replicas == 0


def every_figure(found: Placed, theme: Theme) -> Iterator[go.Figure]:
    loads, layers = frames.device_loads(found), frames.layers(found)
    for name in ("before", "after"):
        yield figures.load_map(loads, name=name, bound=figures.bound_of(loads), theme=theme)
    for quantity in ("balancedness", "per_pass", "remote", "devices"):
        yield figures.layer_curves(layers, quantity=quantity, theme=theme)
    yield figures.move_curves(frames.moves(found), theme=theme)
    yield figures.pass_histogram(frames.by_pass(found), theme=theme)
    yield figures.size_curves(frames.by_size(found), theme=theme)
    yield figures.replica_map(frames.replicas(found), theme=theme)
    yield figures.movement_bars(frames.movement(found), theme=theme)
    yield figures.domain_bars(frames.domains(found), theme=theme)


@pytest.mark.parametrize("theme", THEMES)
def test_every_figure_has_a_title_axes_and_hover_words(found: Placed, theme: Theme) -> None:
    for figure in every_figure(found, theme):
        title = figure.layout.title.text
        assert title and figure.layout.xaxis.title.text, title
        shown = [trace for trace in figure.data if trace.hoverinfo != "skip"]
        assert shown and all(trace.hovertemplate for trace in shown), title


def test_both_maps_share_their_colours(found: Placed) -> None:
    frame = frames.device_loads(found)
    bound = figures.bound_of(frame)
    first, second = (figures.load_map(frame, name=name, bound=bound).data[0] for name in ("before", "after"))
    assert (first.zmin, first.zmid, first.zmax) == (second.zmin, second.zmid, second.zmax) == (2 - bound, 1.0, bound)
    assert 1.2 <= bound <= 2.0


def test_counts_alone_are_drawn_and_the_rest_is_a_sentence(counted: Placed) -> None:
    assert counted.verdict is None and not counted.passes and frames.domains(counted).is_empty()
    drawn: dict[str, Any] = {figure.layout.title.text: figure for figure in every_figure(counted, "light")}
    for title in ("Load per device, as experts lie", "Slots of each expert", "What has to be moved, per layer"):
        assert drawn[title].data, title
    assert len(drawn["Balancedness per layer, the counts"].data) == 2
    for title in ("Balancedness by forward pass", "Moves from layer to layer", "By domain: balancedness per pass"):
        assert not drawn[title].data and "Not known without a trace" in drawn[title].layout.annotations[0].text


def test_domains_cannot_become_markup(found: Placed) -> None:
    frame = frames.domains(found).with_columns(domain=pl.lit("<b>bold</b>"))
    assert all("<b>" not in str(name) for trace in figures.domain_bars(frame).data for name in trace.y)
