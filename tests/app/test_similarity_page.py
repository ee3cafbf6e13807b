"""The page Similarity, its frames and its figures, on a run in which two experts of every layer are one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import synthetic
from streamlit.testing.v1 import AppTest
from visiting import open_section, visited

import store
from app.commands.show import view
from app.figures import similarity as figures
from app.frames import similarity as frames
from profiler.headline import compute_and_store
from profiler.headline.similarity_kinds import KINDS, SimilarityTables, chance, matrices
from profiler.metrics.similarity import linear_hsic, normalised_gram, random_absolute_cosine

TWINS = (3, 9)
LEVELS = "routing,activations,similarity"
ALL = [kind.name for kind in KINDS if not kind.part]
EXPERTS, TOKENS, WIDTH = synthetic.EXPERTS, 40, 12


def sums(seed: int) -> dict[str, pl.DataFrame]:
    """The tables of one layer's pairs, from outputs, logits and weights drawn by lot; the twins are one expert."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(EXPERTS, TOKENS, WIDTH)) + 0.5 * rng.normal(size=(1, TOKENS, WIDTH))
    logits, weights = rng.normal(size=(TOKENS, EXPERTS)) + 3, rng.normal(size=(EXPERTS, 3 * 64 * WIDTH))
    gates = (rng.random((TOKENS, EXPERTS)) < 0.4) * 0.5
    for values in (outputs, weights):
        values[TWINS[1]] = values[TWINS[0]]
    for columns in (logits, gates):
        columns[:, TWINS[1]] = columns[:, TWINS[0]]
    gated = gates.T[:, :, None] * outputs
    directions = outputs / np.linalg.norm(outputs, axis=2, keepdims=True)
    hsic, unbiased = linear_hsic(outputs=outputs)
    used = (gates > 0).astype(int)
    cosine = normalised_gram(gram=weights @ weights.T)
    few = np.where(cosine > np.quantile(cosine, 0.5), np.abs(cosine), np.nan)
    expert = {"expert": range(EXPERTS)}
    common = {**expert, "domain": [""] * EXPERTS, "phase": ["prompt"] * EXPERTS}
    return {
        "router_row": pl.DataFrame({**expert, "weights": weights[:, :WIDTH].tolist()}),
        "expert_pair": pl.DataFrame(
            {
                **common,
                "selections": (used.T @ used).tolist(),
                "logit_products": (logits.T @ logits).tolist(),
                "output_products": np.einsum("itd,jtd->ij", gated, gated).tolist(),
            }
        ),
        "expert_similarity": pl.DataFrame(
            {
                **common,
                "tokens": [TOKENS] * EXPERTS,
                "output_sum": outputs.sum(1).tolist(),
                "cosine_sum": np.einsum("itd,jtd->ij", directions, directions).tolist(),
                "product_sum": np.einsum("itd,jtd->ij", outputs, outputs).tolist(),
                "groups": [1] * EXPERTS,
                "group_tokens": [TOKENS] * EXPERTS,
                "hsic_sum": (TOKENS * hsic).tolist(),
                "unbiased_hsic_sum": (TOKENS * unbiased).tolist(),
            }
        ),
        "expert_weight_similarity": pl.concat(
            pl.DataFrame(
                {
                    **expert,
                    "matrix": [matrix] * EXPERTS,
                    "cosine": cosine.tolist(),
                    "mean_cosine": cosine.tolist(),
                    "matched_cosine": few.tolist(),
                }
            )
            for matrix in ("gate", "up", "down", "all")
        ),
        "logit_sum": pl.DataFrame({**expert, "logit_sum": logits.sum(0)}),
    }


def write(folder: Path, name: str = "alike", *, levels: str = LEVELS, leave_out: tuple[str, ...] = ()) -> Path:
    writer = store.RunWriter.create(folder, name, synthetic.info())
    writer.info.levels = levels
    shard = synthetic.tables()
    shard["router_load"] = shard["router_load"].with_columns(
        logit_tokens=pl.when(pl.col("domain") == synthetic.DOMAINS[0]).then(TOKENS).otherwise(0)
    )
    parts: dict[str, list[pl.DataFrame]] = {}
    for layer in synthetic.LAYERS:
        for table, frame in sums(layer).items():
            parts.setdefault(table, []).append(frame.with_columns(layer=pl.lit(layer), step=pl.lit(0)))
    logits = pl.concat(parts.pop("logit_sum")).with_columns(
        kind=pl.lit("routed"), domain=pl.lit("logits"), phase=pl.lit("prompt"), tokens=pl.lit(0)
    )
    shard["expert_load"] = pl.concat([shard["expert_load"], logits], how="diagonal_relaxed")
    shard |= {table: pl.concat(frames) for table, frames in parts.items()}
    writer.write_shard({name: frame for name, frame in shard.items() if name not in leave_out})
    return writer.finish()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its metrics. Do not change it."""
    found = write(tmp_path_factory.mktemp("alike"))
    compute_and_store(found)
    return found


@pytest.fixture(scope="module")
def run(path: Path) -> Iterator[store.Run]:
    with store.open_run(path) as opened:
        yield opened


def visit(monkeypatch: pytest.MonkeyPatch, directory: Path, **parameters: str) -> AppTest:
    return visited(monkeypatch, directory, "similarity", **parameters)


def words(app: AppTest) -> str:
    kinds = (app.markdown, app.info, app.warning, app.error, app.caption, app.subheader, app.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind)


def titles(app: AppTest) -> list[str]:
    return [json.loads(chart.proto.spec)["layout"]["title"]["text"] for chart in app.get("plotly_chart")]


def test_every_kind_finds_the_twins(run: store.Run) -> None:
    for (layer, _), found in matrices(run):
        assert list(found) == ALL
        for name, matrix in found.items():
            assert matrix[TWINS] == pytest.approx(1.0, abs=1e-6), name
        pairs = frames.redundancy(run).filter(pl.col("layer") == layer)
        assert set(pairs.select("expert", "other").rows()) == {TWINS}
        assert pairs["above_90"].min() == 1


def test_matrices_are_those_of_the_outputs(run: store.Run) -> None:
    rng_layer = synthetic.LAYERS[1]
    tables, found = sums(rng_layer), dict(matrices(run))[rng_layer, 0]
    similar = tables["expert_similarity"]
    np.testing.assert_allclose(found["output_cosine"], np.array(similar["cosine_sum"].to_list()) / TOKENS, atol=1e-12)
    unbiased = np.array(similar["unbiased_hsic_sum"].to_list())
    norm = np.sqrt(np.diag(unbiased))
    np.testing.assert_allclose(found["debiased_cka"], unbiased / np.outer(norm, norm), atol=1e-9)
    products, total = np.array(tables["expert_pair"]["logit_products"].to_list()), tables["logit_sum"]["logit_sum"]
    covariance = products / TOKENS - np.outer(total, total) / TOKENS**2
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(found["router_logit"], covariance / np.outer(deviation, deviation), atol=1e-9)


def test_chance_is_that_of_the_width(run: store.Run) -> None:
    tables = SimilarityTables(run)
    expected = {"router_row": WIDTH, "weight": 3 * 64 * WIDTH, "weight_up": 64 * WIDTH, "weight_mean": 3 * WIDTH}
    for kind, width in expected.items():
        assert chance(tables, kind, (2, 0)) == pytest.approx(random_absolute_cosine(width))
    assert chance(tables, "debiased_cka", (2, 0)) is None
    assert chance(tables, "weight_matched", (2, 0)) is None


def test_matrix_in_the_order_of_another_kind(run: store.Run) -> None:
    own = frames.matrix(run, label="2", kind="debiased_cka")
    beside = frames.matrix(run, label="2", kind="weight", order_by="debiased_cka")
    assert own.select("expert", "other", "place").equals(beside.select("expert", "other", "place"))
    assert len(own) == EXPERTS * (EXPERTS - 1)
    twins = own.filter((pl.col("expert") == TWINS[0]) & (pl.col("other") == TWINS[1]))
    assert abs(twins["place"][0] - twins["other_place"][0]) == 1
    assert twins["angular"][0] == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(own["shifted"], (own["similarity"] + 1) / 2)
    assert frames.matrix(run, label="2", kind="nothing").is_empty()


def test_pairs_carry_all_kinds_and_joint_tokens(run: store.Run) -> None:
    frame = frames.nearest_pairs(run, label="3", kind="output_cosine", count=5)
    assert frame.row(0)[:2] == TWINS
    assert len(frame) == 5
    assert frame["output_cosine"].is_sorted(descending=True)
    selections = sums(3)["expert_pair"]["selections"]
    assert frame["joint_tokens"].to_list() == [selections[i][j] for i, j in frame.select("expert", "other").rows()]
    assert {"weight_gate", *ALL} <= set(frame.columns)


def test_agreement_stands_beside_renamed_experts(run: store.Run) -> None:
    frame = frames.agreement(run)
    assert len(frame) == len(synthetic.LAYERS) * len(ALL) * (len(ALL) - 1) // 2
    same = frame.filter((pl.col("first") == "cka") & (pl.col("second") == "debiased_cka"))
    assert (same["spearman"] > same["high"]).all()
    assert same["p_value"].to_list() == [pytest.approx(0.002)] * 4
    apart = frame.filter((pl.col("first") == "router_logit") & (pl.col("second") == "weight"))
    assert (apart["low"] < 0).all()
    assert (apart["high"] > 0).all()
    assert frame["pairs"].max() == EXPERTS * (EXPERTS - 1) // 2
    few = frame.filter(pl.col("second") == "weight_matched")["pairs"]
    assert few.max() < frame["pairs"].max()
    assert view(run, "similarity-agreement").equals(frame)
    assert view(run, "similarity").equals(frames.redundancy(run))


def test_the_page_shows_two_kinds_and_their_agreement(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    app = visit(monkeypatch, path.parent, layer="3", kind="CKA", beside="router rows")
    assert titles(app) == ["CKA, layer 3", "Router rows, layer 3"]
    pick = json.loads(app.get("plotly_chart")[0].proto.spec)["layout"]["meta"]["pick"]
    assert pick == {"layer": "=3", "expert": "y"}
    assert "120 pairs" in words(app)
    open_section(app, "Pairs")
    assert app.dataframe[0].value.iloc[0][["expert", "other"]].tolist() == list(TWINS)
    open_section(app, "Layers")
    assert titles(app) == ["CKA of all pairs"]
    assert app.dataframe[0].value[["expert", "other"]].to_numpy().tolist() == [list(TWINS)] * 4
    open_section(app, "Agreement")
    assert titles(app) == ["Agreement of the kinds, layer 3", "Agreement of CKA and router rows"]
    open_section(app, "Kinds")
    assert app.dataframe[0].value["here"].all()
    open_section(app, "Maps")
    app.selectbox(key="beside").select("cka").run()
    assert titles(app) == ["CKA, layer 3"]  # one map for one kind
    assert not app.exception
    app.selectbox(key="kind").select("weight_matched").run()
    assert "Empty cells were too costly" in words(app)
    app.session_state["scale"] = "angular"
    app.run()
    assert not app.exception
    heat = json.loads(app.get("plotly_chart")[0].proto.spec)["data"][0]
    assert heat["colorbar"]["title"]["text"].startswith("1")


def test_levels_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = ("expert_similarity", "expert_weight_similarity", "router_row")
    found = write(tmp_path, levels="routing", leave_out=tables)
    app = visit(monkeypatch, tmp_path, section="Kinds")
    needs = app.dataframe[0].value.set_index("title")["needs"]
    assert needs["down weights"] == "level similarity" and needs["router rows"] == "level activations"
    assert not isinstance(needs["router logits"], str)
    open_section(app, "Agreement")
    assert "moescope runs compute" in words(app)  # no metrics yet
    compute_and_store(found)
    assert titles(visit(monkeypatch, tmp_path))[0] == "Router logits, layer 1"


def test_a_run_without_any_kind_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tables = ("expert_similarity", "expert_weight_similarity", "router_row", "expert_pair")
    write(tmp_path, levels="routing", leave_out=tables)
    app = visit(monkeypatch, tmp_path)
    assert "needs the level similarity" in words(app)
    assert titles(app) == []


def test_an_import_gives_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writer = store.RunWriter.create(tmp_path, "imported", synthetic.info(activations=False))
    reason = f"the file holds selections only {synthetic.HOSTILE}"
    omission = pl.DataFrame({"subject": ["logits", "outputs"], "reason": [reason, reason]})
    writer.write_shard({**synthetic.tables(activations=False), "omission": omission})
    writer.finish()
    app = visit(monkeypatch, tmp_path)
    assert "the file holds selections only" in words(app)
    assert "<script" not in words(app).replace("\\<script", "")


def test_a_live_run_shows_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writer = synthetic.live(tmp_path, shards=0)
    writer.write_shard(synthetic.tables(3, activations=False))
    assert "No similarity has been recorded yet" in words(visit(monkeypatch, tmp_path))
    part = sums(1)["expert_similarity"].with_columns(layer=pl.lit(1), step=pl.lit(0))
    for _ in range(2):
        writer.write_shard({"expert_similarity": part})
    app = visit(monkeypatch, tmp_path)
    assert titles(app)[0] == "Debiased CKA, layer 1"
    open_section(app, "Agreement")
    assert "computed from the whole trace when the collection ends" in words(app)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_draw_what_the_frames_hold(theme: Any, run: store.Run) -> None:
    frame = frames.matrix(run, label="2", kind="debiased_cka")
    heat = figures.similarity_map(frame, title="x", layer="2", theme=theme).data[0]
    place = {name: index for index, name in enumerate(heat.x)}
    assert heat.z[place["3"]][place["9"]] == pytest.approx(1.0, abs=1e-5)
    assert np.isnan(np.diag(np.array(heat.z))).all()
    rows = frames.matrix(run, label="2", kind="router_row")
    signed = figures.similarity_map(rows, title="x", layer="2", theme=theme).data[0]
    assert (signed.zmin, signed.zmax, signed.zmid) == (-signed.zmax, signed.zmax, 0.0)
    assert figures.similarity_map(frame, title="x", layer="2", value="angular", theme=theme).data[0].zmid is None
    band = figures.redundancy_band(frames.redundancy(run).filter(kind="weight"), title="x", theme=theme)
    assert [trace.name for trace in band.data][-1] == "random vectors, mean |value|"
    assert list(band.data[-2].y) == [pytest.approx(1.0)] * 4
    agreement, names = frames.agreement(run), {kind.name: kind.title for kind in KINDS}
    drawn = figures.agreement_map(agreement.filter(label="2"), names, title="x", theme=theme).data[0]
    row, column = list(drawn.y).index("debiased CKA"), list(drawn.x).index("CKA")
    (expected,) = agreement.filter(label="2", first="cka", second="debiased_cka")["spearman"]
    assert drawn.z[row][column] == pytest.approx(expected)
    assert "(" not in drawn.text[row][column]


def test_figures_of_nothing_say_so(run: store.Run) -> None:
    empty = frames.matrix(run, label="2", kind="nothing")
    assert "says nothing" in figures.similarity_map(empty, title="x", layer="2").layout.annotations[0].text
    nothing = frames.redundancy(run).head(0)
    assert "says nothing" in figures.redundancy_band(nothing, title="x").layout.annotations[0].text
    none = frames.agreement(run).head(0)
    assert "Two kinds" in figures.agreement_map(none, {}, title="x").layout.annotations[0].text
    assert "different kinds" in figures.agreement_curve(none, title="x").layout.annotations[0].text
