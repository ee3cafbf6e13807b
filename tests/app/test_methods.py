"""The methods by taxonomy: every "where" exists, every registry is in it, and needs are judged by the run."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import polars as pl
import synthetic

import store
from app.commands import COMMANDS
from app.commands.show import VIEWS, view
from app.frames.compress_presets import presets
from app.frames.methods import BESIDE, HAVE, methods
from app.methods import CLASSES
from app.methods import methods as every
from app.views import PAGES
from planner.importance.registry import SCORES
from planner.place.methods import METHODS as PLACEMENTS
from planner.presets import PRESETS
from planner.simulate.policies.registry import POLICIES
from planner.simulate.prefetch import METHODS as WAYS
from profiler.capture.levels import LEVELS
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions
from profiler.metrics.registry import METRICS

DOCS = Path(__file__).parents[2] / "docs"
KNOWN = {
    "page": {page.url for page in PAGES},
    "preset": {one.name for one in PRESETS},
    "policy": {one.name for one in POLICIES},
    "prefetch": {one.name for one in WAYS},
    "place": {one.name for one in PLACEMENTS},
    "view": set(VIEWS),
    "metric": {one.name for one in METRICS},
    "score": {one.name for one in SCORES},
}


def test_every_place_exists() -> None:
    parsers = {command.NAME: command for command in COMMANDS}
    for one in every():
        kind, _, name = one.where.partition(":")
        assert (kind == "") == (one.here == "not here"), one
        if kind == "docs":
            assert (DOCS / name).is_file(), one
        elif kind == "command":
            word, *rest = name.split()
            parser = argparse.ArgumentParser()
            parsers[word].add_arguments(parser)
            known = {flag for action in parser._actions for flag in action.option_strings}
            assert {part for part in rest if part.startswith("--")} <= known, one
        elif kind:
            assert name in KNOWN[kind], one


def test_registries_are_listed_whole() -> None:
    listed = {one.where for one in every()}
    for kind in ("preset", "policy", "prefetch", "place"):
        assert {f"{kind}:{name}" for name in KNOWN[kind]} <= listed
    assert {(one.level, one.group) for one in every()} <= set(CLASSES)
    names = [(one.group, one.name) for one in every()]
    assert len(names) == len(set(names))


def test_papers_are_written_in_one_way() -> None:
    for one in every():
        assert (
            re.fullmatch(r"\d{4}\.\d{5}", one.paper.removeprefix("arXiv "))
            or "arXiv" not in one.paper
            or "," in (one.paper)
            or one.paper.endswith("and its code")
        ), one


def test_needs_are_words_that_are_judged() -> None:
    subjects = {"trace", "order", "weights", "logits", "text", "scores"}
    for one in every():
        for need in one.needs:
            assert need in HAVE or need in BESIDE or need in subjects or set(need.split("|")) <= set(LEVELS), need


def test_frame_judges_a_run(run: store.Run) -> None:
    frame = view(run, "methods")
    assert frame.columns[:5] == ["level", "group", "method", "paper", "here"]
    by_name = {row["method"]: row for row in frame.iter_rows(named=True)}
    assert by_name["Super experts"]["available"] and by_name["Super experts"]["where"] == "page super-experts"
    assert not by_name["HEAPr"]["available"] and "gradients" in by_name["HEAPr"]["reason"]
    assert not by_name["Selective Sinkhorn routing"]["available"]
    empty = frame.filter(pl.col("method") == "")
    assert set(empty["group"]) == {"architecture: attention", "accelerators"}
    order = [CLASSES.index(pair) for pair in frame.select("level", "group").iter_rows()]
    assert order == sorted(order)


def test_a_run_without_activations_lacks_what_needs_them(tmp_path: Path) -> None:
    with store.open_run(synthetic.finished(tmp_path, activations=False)) as run:
        frame = methods(run)
    row = frame.row(by_predicate=pl.col("method") == "Super experts", named=True)
    assert not row["available"] and "activations" in row["reason"]


def test_plans_are_available_where_the_planner_makes_them(tmp_path: Path, run: store.Run) -> None:
    rows = "\n".join(f"{layer},{expert}" for layer in range(6) for expert in range(16) for _ in range(expert + 1))
    (tmp_path / "counts.csv").write_text(f"layer,expert\n{rows}\n")
    model = json.loads((Path(__file__).parents[2] / "sample_data" / "model" / "config.json").read_text())
    for name, options in (("known", ImportOptions(config=model)), ("bare", ImportOptions(num_experts=16, top_k=2))):
        import_run("csv", tmp_path / "counts.csv", directory=tmp_path, name=name, options=options)
    with store.open_run(tmp_path / "known.duckdb") as known, store.open_run(tmp_path / "bare.duckdb") as bare:
        for one in (run, known, bare):
            here = dict(presets(one).select("title", "here").iter_rows())
            judged = methods(one).filter(pl.col("method").is_in(list(here)))
            wrong = [name for name, had in judged.select("method", "available").iter_rows() if here[name] != had]
            assert len(judged) == len(here) and not wrong, one.name
        assert methods(known).filter(pl.col("where").str.contains("--method eplb"))["available"].all()
        placed = methods(bare).filter(pl.col("where").str.contains("--method eplb"))
    assert not placed["available"].any() and "width of the experts" in placed["reason"][0]
