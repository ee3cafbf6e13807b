"""Which kind of comparison two runs make, from their provenance and from the documents beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from app.cli import main
from app.frames import comparison, comparison_kind, comparison_made, comparison_text, token_flips, tokens
from compressor.plan import DropLayer, DropStep, Estimate, LayerShape, Plan, Provenance, Source, Target
from store import LayerInfo, RunInfo, RunWriter
from tests.profiler.paired import EXPERTS, LAYERS, TOP_K, routed, texts, write

GONE = {1: (2, 5), 2: (0, 7)}


def bare(folder: Path, name: str, experts: int = 8, **info: Any) -> store.Run:
    writer = RunWriter.create(folder, name, RunInfo(**{"model": "org/m", "model_type": "olmoe", **info}))
    writer.write_shard({"layer": pl.DataFrame([vars(LayerInfo(layer=1, num_experts=experts, top_k=2))])})
    return store.open_run(writer.finish())


def test_kinds_from_provenance(tmp_path: Path) -> None:
    base = bare(tmp_path, "base", model_fingerprint="f" * 64, dtype="float32")
    kinds = {
        "two engines: transformers and sglang": bare(tmp_path, "served", origin="import sglang"),
        "two models of other shapes": bare(tmp_path, "wide", experts=16),
        "one model in two precisions: float32 and fp8": bare(
            tmp_path, "small", dtype="bfloat16", settings={"weights": {"stored": "fp8"}}
        ),
        "the same weights twice": bare(tmp_path, "again", model_fingerprint="f" * 64, dtype="float32"),
        "two checkpoints of one shape": bare(
            tmp_path, "later", model="org/m-2", model_fingerprint="e" * 64, dtype="float32"
        ),
    }
    for words, other in kinds.items():
        assert comparison_kind.kind(base, other).words == words
    frame = comparison_kind.provenance(base, kinds["two checkpoints of one shape"])
    verdicts = dict(frame.select("what", "verdict").iter_rows())
    assert verdicts["model"] == verdicts["fingerprint"] == "differs" and verdicts["shape"] == "same"
    assert frame["verdict"].to_list() == sorted(frame["verdict"], key=["differs", "not known", "same"].index)
    silent = comparison_kind.provenance(base, kinds["two engines: transformers and sglang"])
    assert dict(silent.select("what", "verdict").iter_rows())["fingerprint"] == "not known"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of "base" and "m" (as every run of these is called), whose plan dropped two of eight experts."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(1)
    tokens = texts(rng, [20, 30])
    ids = routed(rng, tokens)
    kept = {layer: [expert for expert in range(EXPERTS) if expert not in GONE[layer]] for layer in LAYERS}
    fewer = [
        np.stack([np.argsort(rng.random((len(one), 6)), 1)[:, :TOP_K].astype(np.int16) for _ in LAYERS])
        for one in tokens
    ]
    for axis, layer in enumerate(LAYERS):  # whoever used kept experts alone uses them still
        for before, after in zip(ids, fewer, strict=True):
            stays = np.isin(before[axis], kept[layer]).all(1)
            after[axis][stays] = np.searchsorted(kept[layer], before[axis][stays])
    write(folder, "base", tokens, ids).close()
    write(folder, "pruned", tokens, fewer, experts=6).close()
    shapes = tuple(LayerShape(layer=layer, num_experts=EXPERTS, top_k=TOP_K, width=4) for layer in LAYERS)
    plan = Plan(
        provenance=Provenance(run="base", tool_version="0"),
        source=Source(model="m", model_type="olmoe", hidden_size=8, expert_size=8, num_layers=4, layers=shapes),
        target=Target(share=0.25, preset="frequency"),
        steps=(DropStep(method="frequency", layers=tuple(DropLayer(layer=at, experts=GONE[at]) for at in LAYERS)),),
        estimate=Estimate(
            expert_parameters=16,
            expert_parameters_after=12,
            active_parameters=6,
            active_parameters_after=6,
            bytes_saved=1,
        ),  # fmt: skip
    )
    path = folder / "base.duckdb"
    store.write_plan(path, plan.text())
    receipt = {"plan": plan.digest, "destination": "/elsewhere/m"}
    store.write_plan(path, json.dumps(receipt), kind="receipt", name=plan.digest[:12])
    return folder


def test_experts_are_matched_by_the_plan_beside_the_run(made: Path) -> None:
    with store.open_run(made / "base.duckdb") as base, store.open_run(made / "pruned.duckdb") as pruned:
        for pair, side in (((base, pruned), "first"), ((pruned, base), "second")):
            found = comparison_made.link(*pair)
            assert found is not None and found.base == side
            words = comparison_kind.kind(*pair, link=found).words
            assert words == "base and compressed by a plan: drops 4 of 16 experts (frequency)"
            assert comparison_kind.provenance(*pair, link=found).filter(what="plan applied")["verdict"][0] == "differs"
        link = comparison_made.link(base, pruned)
        frames = comparison.tables(base, pruned, link=link)
        there = comparison_text.both(
            base, other=str(pruned.path), version=0, sequence=3, other_sequence=3, link=link
        )  # fmt: skip
        trace = base.selections(sequences=[3])
    for axis, layer in enumerate(LAYERS):
        load = frames["load"].filter(layer=layer)
        gone = load.filter(pl.col("expert").is_in(GONE[layer]))
        assert gone["other_share"].is_null().all() and (gone["difference"] == -gone["share"]).all()
        used = ~np.isin(trace.ids[axis, 0], GONE[layer]).any(1)
        assert not there.flipped[axis][used].any() and there.flipped[axis][~used].all()
        np.testing.assert_array_equal(there.second.routes.ids[axis][used], trace.ids[axis, 0][used])
        assert not np.isin(there.second.routes.ids[axis], GONE[layer]).any()
    rows = comparison_text.rows(there)
    assert rows["flipped"].sum() == there.flipped.sum() and len(rows) == 40


def test_the_command_takes_the_plan_too(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "base", "pruned", "--store", str(made), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["agreement"][1]["value"] < 1


def test_without_the_plan_other_counts_are_refused(made: Path, tmp_path: Path) -> None:
    for name in ("base", "pruned"):
        (tmp_path / f"{name}.duckdb").write_bytes((made / f"{name}.duckdb").read_bytes())
    assert main(["compare", "base", "pruned", "--store", str(tmp_path)]) == 2
    with store.open_run(tmp_path / "base.duckdb") as base, store.open_run(tmp_path / "pruned.duckdb") as pruned:
        assert comparison_made.link(base, pruned) is None
        assert comparison_made.measured(base, pruned).is_empty()
        assert comparison.evenness(base, other=str(pruned.path), version=0)["num_experts"].to_list() == [8, 8, 6, 6]


@pytest.mark.parametrize("axis", range(len(LAYERS)))
def test_tokens_that_flip_where_experts_were_dropped(made: Path, axis: int) -> None:
    layer = LAYERS[axis]
    kept = np.array([expert for expert in range(EXPERTS) if expert not in GONE[layer]])
    with store.open_run(made / "base.duckdb") as base, store.open_run(made / "pruned.duckdb") as pruned:
        before, after = base.selections(), pruned.selections()
        found = token_flips.sequences(base, pruned, label=str(layer))["sequences"]
        assert sorted(found["sequence"]) == sorted(before.sequences.tolist())
        for one, other, hits, length in found.select("sequence", "other_sequence", "hits", "tokens").iter_rows():
            (here,), (there,) = np.nonzero(before.sequences == one), np.nonzero(after.sequences == other)
            mine = before.ids[axis, here[0], :length]
            theirs = kept[after.ids[axis, there[0], :length]]
            changed = [set(a.tolist()) ^ set(b.tolist()) for a, b in zip(mine, theirs, strict=True)]
            assert hits == sum(map(bool, changed))
            places = ((base, one), (pruned, other))
            routes = [tokens.routes(run, sequence=at, first=0, last=length - 1) for run, at in places]
            shares = token_flips.flips(base, pruned, *routes, labels=[str(layer)])
            assert shares == pytest.approx([len(one) / 2 / TOP_K for one in changed], abs=1e-12)
