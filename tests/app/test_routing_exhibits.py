"""Exhibits and answers of Routing and Local consistency: choices, what is absent and why, and figures in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic

import store
from app.exhibits import Absent, Exhibit, entries, make
from app.exhibits import local_consistency_answers as local
from app.exhibits import routing_answers as routing
from app.figures import consistency as figures
from app.figures.experts import expert_points
from app.figures.heatmap import percent_of_chance
from app.frames import consistency, domains, load
from moescope.errors import InputError
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions

MINE = {name: entry for name, entry in entries().items() if entry.page in ("routing", "local-consistency")}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    with store.open_run(synthetic.finished(tmp_path_factory.mktemp("exhibits"), sequences=6)) as run:
        yield run


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[store.Run]:
    """An imported run that has counts and nothing else."""
    folder = tmp_path_factory.mktemp("counts")
    rows = "\n".join(f"{layer},{expert}" for layer in range(3) for expert in range(8))
    (folder / "counts.csv").write_text(f"layer,expert\n{rows}\n")
    options = ImportOptions(num_experts=8, top_k=2)
    import_run("csv", folder / "counts.csv", directory=folder, name="counts", options=options)
    with store.open_run(folder / "counts.duckdb") as run:
        yield run


def drawn_or_absent(name: str, run: store.Run) -> Exhibit | Absent:
    try:
        return make(name, run, theme="dark")
    except Absent as missing:
        return missing


@pytest.mark.parametrize("name", MINE)
def test_every_exhibit_is_drawn_or_says_why_not(name: str, opened: store.Run, counts: store.Run) -> None:
    for run in (opened, counts):
        made = drawn_or_absent(name, run)
        if isinstance(made, Absent):
            assert made.reason.endswith((".", ":")) and bool(made.remedy) == made.reason.endswith(":")
            assert run is counts or "computed" in made.reason  # its metrics are some of all
            continue
        assert made.figure.data and made.read.endswith(".") and made.alt
        assert made.figure.layout.title.text
        assert len(made.frame)
    if name not in ("load", "balance"):
        with pytest.raises(Absent):
            make(name, counts)


def test_maps_and_curves_pick_layers_and_experts(opened: store.Run) -> None:
    picks = {
        "load": {"layer": "y", "expert": "x"},
        "srp-map": {"layer": "y", "expert": "x"},
        "srp-experts": {"layer": "customdata.0", "expert": "customdata.1"},
        "expert-pairs": {"layer": "=1", "expert": "x"},
        **dict.fromkeys(("balance", "domain-distance", "confidence", "srp-layers", "repetition"), {"layer": "x"}),
    }
    for name, sources in picks.items():
        assert make(name, opened).figure.layout.meta["pick"] == sources, name
    followed = make("transitions", opened, choices={"layer": "5", "source": "2"}).figure
    assert followed.layout.meta["pick"] == {"layer": "=5", "expert": "x"}
    assert make("transitions", opened).figure.layout.title.text == "From layer 1 to layer 2"


def test_bad_choices_are_named(opened: store.Run) -> None:
    for name, choices in (
        ("transitions", {"layer": "2", "source": "3"}),
        ("expert-pairs", {"measure": "magic"}),
        ("srp", {"domain": "klingon"}),
        ("confidence", {"quantity": "mood"}),
    ):
        with pytest.raises(InputError) as refused:
            make(name, opened, choices=choices)
        assert str(next(reversed(choices.values()))) in str(refused.value)
    with pytest.raises(Absent, match="first MoE layer"):
        make("transitions", opened, choices={"layer": "1"})
    with pytest.raises(Absent, match="over segments of 5 tokens; there are 4, 16, 64"):
        make("srp-map", opened, choices={"segment": 5})


def test_the_answer_on_load_is_that_of_the_counts(opened: store.Run) -> None:
    table = opened.table("expert_load").filter(pl.col("kind") == "routed")
    tokens = np.zeros((len(synthetic.LAYERS), synthetic.EXPERTS))
    for row in table.iter_rows(named=True):
        tokens[synthetic.LAYERS.index(row["layer"]), row["expert"]] += row["tokens"]
    relative = tokens / tokens.mean(axis=1, keepdims=True)
    layer, expert = np.unravel_index(relative.argmax(), relative.shape)
    words = routing.load(opened)
    assert f"Layer **{synthetic.LAYERS[layer]}** is the least even: its expert {expert} takes" in words
    assert f"**{relative.max():.1f} times** the uniform share" in words
    assert f"**{(tokens == 0).sum()} of {tokens.size} experts** were never used" in words
    assert "were never used" not in routing.load(opened, phase="decode")  # no such text


def test_answers_of_one_layer_and_of_two_domains(opened: store.Run) -> None:
    def one_layer(maker: Any, run: store.Run, /, **arguments: Any) -> Any:
        frame = maker(run, **arguments)
        return frame.filter(pl.col("label") == "1") if "label" in frame.columns else frame

    assert routing.confidence(opened, frames=one_layer).startswith("The router's median entropy is **")
    assert "nearest" not in routing.pairs(opened, frames=one_layer)
    assert "the least" not in local.places(opened, frames=one_layer)
    assert "most in layer" not in local.repetition(opened, frames=one_layer)
    third = opened.domains[-1]

    def two_domains(maker: Any, run: store.Run, /, **arguments: Any) -> Any:
        frame = maker(run, **arguments)
        return frame.filter(pl.col("domain") != third) if "domain" in frame.columns else frame

    words = routing.domains(opened, frames=two_domains)
    assert "of either's selections" in words and "least" not in words
    held_out = pl.DataFrame({
        "label": ["all"], "extra": [0], "control": ["observed"], "predictor": ["transition"], "value": [0.5],
        "low": [0.4], "high": [0.6], "chance": [0.1],
    })  # fmt: skip
    early = pl.DataFrame({"distance": [1], "extra": [0], "input": ["router"], "value": [0.7]})
    of_a_part = routing.foreseen(held_out, early, part=True)
    assert "the experts of the layer before in all text, **70.0%** by its router run early, 10.0% by" in of_a_part
    assert "in all text" not in routing.foreseen(held_out, early)


def test_domains_stand_beside_what_chance_gives(opened: store.Run) -> None:
    frame = domains.specialization(opened)
    row = frame.filter(pl.col("label") == "2").row(0, named=True)
    shares = [load.expert_load(opened, domain=name).filter(pl.col("label") == "2") for name in opened.domains]
    pooled = np.mean([share["share"].to_numpy() for share in shares], axis=0)
    rng, drawn = np.random.default_rng(0), []
    totals = [int(share["tokens"].to_numpy().sum()) for share in shares]
    for _ in range(2000):
        several = np.array([rng.multinomial(total, pooled) / total for total in totals])
        drawn.append(np.abs(several[0] - several.mean(axis=0)).sum() / 2)
    assert row["noise"] == pytest.approx(np.mean(drawn), rel=0.05)
    most = frame.group_by("domain").agg(pl.col("moved").mean()).sort("moved", descending=True)
    words = routing.domains(opened)
    assert words.startswith(f"**{most['domain'][0]}** differs most")
    assert f"**{most['moved'][0]:.0%}** of its selections" in words
    assert most["domain"][0] in make("domain-difference", opened).figure.layout.title.text


def test_answers_of_local_consistency_are_the_stored_figures(opened: store.Run) -> None:
    words = local.srp(opened, segment=16)
    assert "**53.0%** of the router's choices" in words and "**15.0 points** are consistency in time" in words
    assert "Layer **5** is the most consistent (SRP **59.0%** over 16 tokens)" in local.places(opened)
    assert "A token shares **60%** of its experts" in local.repetition(opened)
    above = consistency.published_srp().filter((pl.col("segment_length") == 16) & (pl.col("value") > 0.53))
    assert f"by SRP over 16 tokens **{len(above) + 1} of 23**" in local.published(opened)
    assert f"{math.log(synthetic.EXPERTS):.3g} nats" in routing.confidence(opened)
    assert "least in layer **" in routing.confidence(opened, quantity="boundary_margin")


def test_answers_of_a_run_of_counts_are_empty_or_absent(counts: store.Run) -> None:
    assert routing.load(counts).startswith("Layer **")
    empty = (routing.domains, routing.purpose, routing.confidence, routing.pairs, routing.foresight)
    assert [answer(counts) for answer in empty] == [""] * len(empty)
    for absent in (local.srp, local.caches, local.published):
        with pytest.raises(Absent):
            absent(counts)


def test_repetition_is_drawn_over_one_token_and_by_distance() -> None:
    rows = [
        (layer, 0, str(layer), "mean_overlap", control, lag, value / lag)
        for layer in (1, 2)
        for control, value in (("observed", 0.6), ("shuffled", 0.2))
        for lag in (1.0, 2.0, 4.0)
    ]
    columns = ["layer", "step", "label", "metric", "control", "lag", "value"]
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    drawn = figures.repetition_curves(frame).data
    assert [(list(trace.x), list(trace.y)) for trace in drawn] == [(["1", "2"], [0.6, 0.6]), (["1", "2"], [0.2, 0.2])]
    heat = figures.overlap_map(frame).data[0]
    np.testing.assert_allclose(heat.z, [[60, 30, 15]] * 2)
    np.testing.assert_allclose(heat.customdata, [[20, 10, 5]] * 2)


def test_large_figures_are_sent_in_binary() -> None:
    assert percent_of_chance(np.array([[1.0, np.nan], [384.0, np.inf]])).dtype == np.uint16
    assert percent_of_chance(np.array([700.0]))[0] == 70_000
    frame = pl.DataFrame({"layer": [0, 1] * 2000, "step": 0, "expert": range(4000), "x": 0.5, "y": 0.5})
    frame = frame.with_columns(pl.col("layer").cast(pl.String).alias("label"))
    plain = expert_points(frame, x="x", y="y", hover="h").data[0]
    assert plain.type == "scattergl" and plain.customdata.dtype == np.int16
    stepped = frame.with_columns(step=pl.lit(1), label=pl.col("label") + ".1")
    assert tuple(expert_points(stepped, x="x", y="y", hover="h").data[0].customdata[1]) == ("1.1", 1)
