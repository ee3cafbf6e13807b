"""The page Architecture on a run of every kind: what it shows, what it says, and what it leaves out."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from visiting import open_section, visited

import profiler
import store
from app import exhibits
from app.exhibits import Absent
from app.exhibits import architecture_answers as answers
from app.findings.findings import findings
from app.frames import axis, imbalance, kinds, neighbours, shared_output, steps
from app.frames.architecture import subjects
from compressor.families import ADAPTERS
from profiler.headline import compute
from profiler.headline.axes import axis_distance_rows
from profiler.headline.flow import PAIRS, lookahead_rows, transition_rows
from profiler.headline.layer_memory import layer_memory_rows, step_repeat_rows
from profiler.headline.neighbours import neighbour_rows
from profiler.metrics.router_rows import router_rows
from store import LayerInfo, RunInfo, RunWriter
from tests.profiler.capture.tiny import build

PARTS = (
    PAIRS, transition_rows, lookahead_rows, layer_memory_rows, step_repeat_rows, neighbour_rows, axis_distance_rows,
)  # fmt: skip
ROOT = Path(__file__).parents[2]
CHARTS = {
    "f against P": 2, "Shared": 2, "Kinds": 2, "Steps": 4, "Axes": 4, "Memory": 2, "Neighbours": 2, "Router rows": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run with kinds and axes (longcat), one with steps (chain), one with shared experts."""
    directory = tmp_path_factory.mktemp("architecture")
    before = dict(ADAPTERS)
    chain = runpy.run_path(str(ROOT / "docs" / "examples" / "chain_of_experts.py"))["ChainModel"]
    torch.manual_seed(0)
    try:
        for name, model, level in (
            ("longcat", build("longcat_flash"), "activations"),
            ("chain", chain(), "routing"),
            ("shared", build("qwen2_moe"), "activations,lookahead"),
        ):
            with torch.no_grad(), profiler.watch(model, store=directory, name=name, level=level) as session:
                for number in range(4):
                    session.label(domains=["a", "b"] * 3, timestep=[1000, 20] * 3, note=f"<b>{number % 2}")
                    model(torch.randint(3, 32, (6, 24)))
            assert session.path is not None
            with store.open_run(session.path) as run:
                found, _ = compute(run, parts=PARTS)
            store.write_metrics(session.path, found)
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(before)
    return directory


def opened(runs: Path, name: str) -> store.Run:
    return store.open_run(runs / f"{name}.duckdb")


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("longcat", ["f against P", "Kinds", "Axes", "Memory", "Neighbours", "Router rows"]),
        ("chain", ["f against P", "Steps", "Axes", "Memory"]),
        ("shared", ["f against P", "Shared", "Axes", "Memory", "Neighbours", "Router rows"]),
    ],
)
def test_the_page_shows_what_the_run_has(
    runs: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: list[str]
) -> None:
    assert subjects(opened(runs, name)) == there
    app = visited(monkeypatch, runs, "architecture", run=name)
    lacks = {("longcat", "Memory"): 1, ("longcat", "Kinds"): 1, ("longcat", "Neighbours"): 1, ("chain", "Steps"): 4}
    for section in there:
        open_section(app, section)
        assert len(app.get("plotly_chart")) == lacks.get((name, section), CHARTS[section]), section
        assert not app.error
        assert len(app.markdown) > 1 or section == "Neighbours"
    for entry in exhibits.entries().values():
        if entry.page == "architecture":
            try:
                made = exhibits.make(entry.name, opened(runs, name), theme="dark")
            except Absent:
                continue
            assert len(made.frame)
            assert made.alt


def test_axes_stand_in_their_order_and_their_names_are_text(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(runs, "shared")
    assert axis.names(run) == ["note", "timestep", "position"]
    frame = axis.values(run, axis="timestep", label="0")
    assert frame["value"].to_list() == ["20", "1000"]
    assert frame["sequences"].to_list() == [12, 12]
    assert frame["tokens"].to_list() == [12 * 24] * 2
    shares = axis.shares(run, axis="timestep", label="0")
    late = run.selections(sequences=list(range(0, 24, 2))).ids[0]
    counts = shares.filter(pl.col("value") == "1000").sort("expert")["tokens"].to_numpy()
    np.testing.assert_array_equal(counts, np.bincount(late.ravel(), minlength=len(counts)))
    figure = exhibits.make("axis-shares", run, choices={"axis": "note"}).figure
    assert "<b>" not in figure.to_json().replace("\\u003c", "<").replace("<br>", "")
    with pytest.raises(Exception, match="axis 'colour' is none of note, timestep, position"):
        exhibits.make("axis-shares", run, choices={"axis": "colour"})
    app = visited(monkeypatch, runs, "architecture", "Axes", run="shared", axis="nothing")
    assert app.selectbox(key="axis").value == "note"


def test_kinds_are_counted_as_the_trace_has_them(runs: Path) -> None:
    run = opened(runs, "longcat")
    ids = run.selections().ids[0].reshape(-1)
    frame = kinds.shares(run).filter(pl.col("label") == "0")
    assert dict(frame.select("kind", "selections").rows()) == {
        "routed": int((ids < 8).sum()), "copy": int((ids >= 8).sum()),
    }  # fmt: skip
    assert frame["computed"][0] == pytest.approx(float((ids < 8).sum()) / (24 * 24))
    said = answers.kinds(run)
    assert f"**{kinds.shares(run).filter(pl.col('kind') == 'copy')['selections'].sum() / (2 * len(ids)):.1%}**" in said
    with pytest.raises(Absent, match="Every expert of this model has a network"):
        exhibits.make("kinds", opened(runs, "chain"))
    with pytest.raises(Absent, match="calls its experts once"):
        exhibits.make("step-repeat", run)


def test_kinds_by_token(tmp_path: Path) -> None:
    pieces = [b"<s>", b" ", b"12", b" =", b" word", b"ly", "本".encode()[:2]]
    ids = np.array([0, 1, 2, 3, 4, 5, 6] * 30)
    chosen = np.where(ids % 7 == 4, 0, 2)[:, None].astype(np.int16)  # words compute, all else is copied
    writer = RunWriter.create(tmp_path, "kinds", RunInfo(model="m", num_layers=1, text_kept=True))
    writer.write_shard(
        {
            "layer": pl.DataFrame([vars(LayerInfo(0, 0, "m", "E", "R", 3, 1, 0, 4))]),
            "expert": {"layer": [0] * 3, "step": [0] * 3, "expert": [0, 1, 2], "kind": ["routed", "routed", "copy"]},
            "sequence": {"sequence": [0], "tokens": [len(ids)], "domain": ["a"]},
            "sequence_token": {"sequence": [0], "start": [0], "token_ids": [ids.tolist()],
                               "special": [(ids == 0).tolist()]},
            "vocabulary": {"token_id": list(range(7)), "bytes": pieces},
            "route_chunk": store.pack_trace(
                layer=0, sequence=np.zeros(len(ids), int), position=np.arange(len(ids)), ids=chosen,
                weights=np.ones((len(ids), 1), np.float32), num_experts=3,
            ),
        }
    )  # fmt: skip
    found = kinds.by_token(store.open_run(writer.finish()))
    classes = found.classes.filter(pl.col("label") == "all").unique("token_class", maintain_order=True)
    assert classes["token_class"].to_list() == list(kinds.CLASSES)
    assert dict(classes.select("token_class", "computed").rows()) == {
        name: float(name == "word") for name in kinds.CLASSES
    }
    assert found.tokens["text"].to_list()[-1] == "␣word"
    assert found.tokens["computed"].to_list() == [0.0] * 6 + [1.0]


def test_steps_and_neighbours_and_rows(runs: Path) -> None:
    chain = opened(runs, "chain")
    assert steps.steps_of(chain) == [0, 1]
    assert (steps.source_of(chain, "0.1"), steps.source_of(chain, "1")) == ("0", None)
    ids = chain.selections().ids
    shared = (ids[0][..., :, None] == ids[1][..., None, :]).any(-2).mean()
    assert steps.repeats(chain)["repeat"][0] == pytest.approx(float(shared))
    run = opened(runs, "shared")
    early = neighbours.recalls(run)
    table = run.table("lookahead").filter(
        (pl.col("distance") == 1) & (pl.col("input") == "router") & ~pl.col("first") & (pl.col("layer") == 2)
    )
    hits = sum(row[0] for row in table["hits"].to_list()) / table["selections"].sum()
    assert early.filter(pl.col("label") == "2")["recall"][0] == pytest.approx(hits)
    rows = np.array(run.table("router_row", layer=0).sort("expert")["weights"].to_list())
    said = exhibits.make("router-row-spread", run).frame.row(0, named=True)
    assert said["spread"] == pytest.approx(router_rows(rows=rows).spread)
    assert exhibits.make("router-rows", run).frame["pairs"].sum() == len(rows) * (len(rows) - 1) // 2


def test_shared_output_by_domain(runs: Path) -> None:
    run = opened(runs, "shared")
    frame = shared_output.norms(run)
    outputs = run.table("expert_output", layer=1).filter(pl.col("kind") == "shared")
    routed = run.table("moe_output", layer=1)
    for domain in (None, "a"):
        parts = [part if domain is None else part.filter(pl.col("domain") == domain) for part in (outputs, routed)]
        expected = np.sqrt(parts[0]["gated_norm_square_sum"].sum() / parts[1]["output_square_sum"].sum())
        mine = frame.filter(pl.col("label") == "1").filter(pl.col("domain").eq_missing(pl.lit(domain, pl.String)))
        assert mine["ratio"][0] == pytest.approx(expected)
    assert "The shared experts add **" in answers.shared(run)


def planted(directory: Path, load: list[float], probability: list[float]) -> store.Run:
    tokens = 10_000
    writer = RunWriter.create(directory, "planted", RunInfo(model="m", num_layers=1))
    place: dict[str, Any] = {"layer": 0, "step": 0, "domain": "a", "phase": "prompt"}
    columns = {"expert": [0, 1, 2, 3], "tokens": [int(tokens * part) for part in load],
               "probability_sum": [tokens * part for part in probability]}  # fmt: skip
    router = {"tokens": [tokens], "logit_tokens": [tokens], "entropy_sum": [1.0], "top_probability_sum": [1.0]}
    literal = {name: pl.lit(value) for name, value in place.items()}
    writer.write_shard(
        {
            "layer": pl.DataFrame([vars(LayerInfo(0, 0, "m", "E", "R", 4, 1, 0, 4))]),
            "expert_load": pl.DataFrame(columns).with_columns(**literal, kind=pl.lit("routed")),
            "router_load": pl.DataFrame(router).with_columns(**literal),
        }
    )
    return store.open_run(writer.finish())


@pytest.mark.parametrize(
    ("load", "probability", "hidden"),
    [
        ([0.7, 0.1, 0.1, 0.1], [0.25] * 4, True),
        ([0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], False),
        ([0.25] * 4, [0.7, 0.1, 0.1, 0.1], False),
    ],
)
def test_a_loss_that_is_satisfied_is_told_of_only_where_it_hides_something(
    tmp_path: Path, load: list[float], probability: list[float], hidden: bool
) -> None:
    run = planted(tmp_path, load, probability)
    row = imbalance.spreads(run).row(0, named=True)
    assert row["unseen_imbalance"] is hidden
    assert row["loss"] == pytest.approx(4 * sum(f * p for f, p in zip(load, probability, strict=True)))
    assert ("**The loss is satisfied, and the load is not balanced**" in answers.probability(run)) is hidden
    found = [one for one in findings(run) if one.subject == "Balance loss"]
    assert bool(found) is hidden
    assert all(one.answer.endswith("not balanced in layer 0") for one in found)
    names = [trace.name for trace in exhibits.make("load-spread", run).figure.data]
    assert ("loss satisfied but unbalanced" in names) is hidden
