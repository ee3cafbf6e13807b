"""Frames against the numbers that the synthetic run was made of."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import synthetic
from synthetic import DOMAINS, EXPERTS, LAYERS, SUPER_EXPERT, TOKENS, TOP_K

import store
from app.frames import (
    alerts,
    axes,
    confidence,
    consistency,
    domains,
    load,
    overview,
    super_experts,
    token_measures,
    tokens,
)

TOTAL = 9 * TOKENS


def test_load_counts_every_expert_and_shares_sum_to_one(run: store.Run) -> None:
    frame = load.expert_load(run)
    assert len(frame) == len(LAYERS) * EXPERTS
    summed = frame.group_by("layer").agg(pl.col("tokens", "share", "gate_share").sum())
    assert summed["tokens"].to_list() == [TOTAL * TOP_K] * len(LAYERS)
    np.testing.assert_allclose(summed["share"], 1.0)
    np.testing.assert_allclose(summed["gate_share"], 1.0)
    dead = frame.filter(pl.col("expert") == EXPERTS - 1)
    assert dead["tokens"].to_list() == [0] * len(LAYERS)
    np.testing.assert_allclose(frame["relative"], frame["share"] * EXPERTS)


def test_load_matches_the_trace(run: store.Run) -> None:
    ids = run.selections(domain="deutsch", layers=[3]).ids
    counts = np.bincount(ids[ids >= 0], minlength=EXPERTS)
    frame = load.expert_load(run, domain="deutsch").filter(pl.col("layer") == 3)
    assert frame["tokens"].to_list() == counts.tolist()


def test_balance_agrees_with_a_second_formula(run: store.Run) -> None:
    frame = load.balance(run)
    shares = load.expert_load(run).filter(pl.col("layer") == 2)["share"].to_numpy()
    row = frame.filter(pl.col("layer") == 2).row(0, named=True)
    positive = shares[shares > 0]
    assert row["normalised_entropy"] == pytest.approx(-(positive * np.log(positive)).sum() / np.log(EXPERTS))
    assert row["max_violation"] == pytest.approx(shares.max() * EXPERTS - 1)
    assert row["dead"] == 1
    assert row["tokens"] == TOTAL


def test_a_domain_without_load_gives_nulls_not_errors(run: store.Run) -> None:
    frame = load.balance(run, phase="decode")
    assert frame["max_violation"].null_count() == len(LAYERS)
    assert load.expert_load(run, phase="decode")["share"].null_count() == len(LAYERS) * EXPERTS


def test_coverage_counts_starved_experts(run: store.Run) -> None:
    frame = load.coverage(run)
    assert frame["starved"].to_list() == [1] * len(LAYERS)
    np.testing.assert_allclose(frame["balanced"], TOTAL * TOP_K / EXPERTS)
    assert (frame["fewest"] <= frame["median"]).all()


def test_shared_experts_stand_apart(run: store.Run) -> None:
    assert load.shared_load(run)["tokens"].to_list() == [TOTAL] * len(LAYERS)
    assert load.expert_load(run)["expert"].max() == EXPERTS - 1


def test_domains(run: store.Run) -> None:
    assert set(domains.domain_tokens(run)["domain"]) == set(DOMAINS)
    shares = domains.domain_shares(run)
    differences = shares.group_by("layer", "expert").agg(pl.col("difference").sum())
    np.testing.assert_allclose(differences["difference"], 0.0, atol=1e-12)
    moved = domains.specialization(run)
    assert moved["moved"].is_between(0.05, 1.0).all()


def test_confidence_means_and_percentiles(run: store.Run) -> None:
    frame = confidence.confidence(run)
    assert set(frame["quantity"]) == set(confidence.QUANTITIES)
    row = frame.filter((pl.col("layer") == 1) & (pl.col("quantity") == "entropy")).row(0, named=True)
    assert row["mean"] == pytest.approx(2.0)
    assert row["p10"] < row["p50"] < row["p90"]
    assert row["tokens"] == TOTAL


def test_super_experts_are_marked_with_their_place(run: store.Run) -> None:
    frame = super_experts.output_maxima(run)
    top = frame.row(0, named=True)
    assert (top["layer"], top["expert"]) == SUPER_EXPERT
    assert top["paper"] and top["code"]
    assert (top["channel"], top["position"]) == (11, 0)
    assert frame["paper"].sum() == 1
    assert super_experts.output_maxima(run, tokens="first_routed")["position"].null_count() == len(frame)
    assert super_experts.thresholds(run)["value"].to_list() == [82.0] * 4


def test_a_shared_expert_can_be_a_super_expert(tmp_path: Path) -> None:
    path = synthetic.finished(tmp_path, metrics=False)
    parameters = '{"rule": "paper", "tokens": "all"}'
    rows = {"metric": "super_experts", "parameters": parameters, "layer": 3, "expert": -1, "value": 9.0}
    store.write_metrics(path, pl.DataFrame([rows]))
    with store.open_run(path) as run:
        found = super_experts.output_maxima(run).filter(pl.col("paper"))
    assert found.select("layer", "expert", "kind").rows() == [(3, 0, "shared")]


def test_residual_marks_massive_layers(run: store.Run) -> None:
    frame = super_experts.residual(run)
    assert frame.filter(pl.col("massive"))["layer"].to_list() == [2, 3, 4]
    assert frame.filter(pl.col("forming"))["layer"].to_list() == [2]  # in 3 and 4 it only stays
    assert frame["later_max"].to_list() == [8.0 + layer for layer in range(6)]


def test_srp_frames(run: store.Run) -> None:
    model = consistency.srp_model(run)
    assert set(model["control"]) == set(consistency.CONTROLS)
    np.testing.assert_allclose(model["lower_bound"], 2 / 9)
    assert len(consistency.srp_layers(run)) == 3 * len(LAYERS)
    experts = consistency.srp_experts(run)
    frequency = experts.filter((pl.col("segment_length") == 16) & (pl.col("layer") == 1))["frequency"]
    assert frequency.sum() == pytest.approx(TOP_K)


def test_hit_rate_scopes_and_ratio(run: store.Run) -> None:
    frame = consistency.hit_rates(run)
    assert set(frame["scope"]) == {"shared", "layers", *map(str, LAYERS)}
    shared = frame.filter((pl.col("scope") == "shared") & (pl.col("slots") == EXPERTS * len(LAYERS)))
    np.testing.assert_allclose(shared["ratio"], EXPERTS / TOP_K)
    numbers = consistency.key_numbers(run)
    assert numbers["name"].to_list() == ["SRP", "LRU hit rate", "SCH hit rate", "Belady hit rate"]
    assert numbers["value"].is_between(0, 1).all()


def test_among_published_keeps_all_models(run: store.Run) -> None:
    mine = consistency.srp_model(run).filter((pl.col("segment_length") == 16) & pl.col("domain").is_null())
    published = consistency.published_srp().filter(pl.col("segment_length") == 16)
    frame = consistency.among_published(mine, published, name="mine")
    assert frame["ours"].sum() == 1
    assert len(frame) == len(published) + 1
    assert frame["value"].is_sorted(descending=True)


def test_alerts_name_dead_experts_and_the_chance_of_an_accident(run: store.Run) -> None:
    frame = alerts.alerts(run)
    row = frame.filter(pl.col("alert") == "dead experts").row(0, named=True)
    assert row["severity"] == "warning"
    assert row["layers"] == "1, 2, 3, 5"
    assert "probability" in row["detail"]


def test_alerts_report_failed_checks_collapse_and_broken_logits(tmp_path: Path) -> None:
    frames = synthetic.tables(3)
    frames["check"] = pl.DataFrame(
        [{"name": "counts_sum", "layer": 1, "step": 0, "status": "fail", "detail": "off by 3"}]
    )
    frames["router_load"] = frames["router_load"].with_columns(pl.lit(5).alias("nonfinite_tokens"))
    frames["expert_load"] = frames["expert_load"].filter(pl.col("expert") < 2)
    writer = store.RunWriter.create(tmp_path, "broken", synthetic.info())
    writer.write_shard(frames)
    with store.open_run(writer.finish()) as run:
        frame = alerts.alerts(run)
        assert run.badge.status == "invalid"
    found = dict(frame.select("alert", "severity").rows())
    assert found["check failed: counts_sum"] == "problem"
    assert found["routing collapse"] == "problem"
    assert found["non-finite router logits"] == "problem"
    assert frame["severity"][0] == "problem"


def test_overview_frames(run: store.Run) -> None:
    figures = dict(overview.key_figures(run).select("figure", "value").rows())
    assert figures["tokens"] == f"{TOTAL:,}"
    assert figures["MoE layers"] == "4"
    assert overview.checks(run)["status"].to_list()[0] == "skipped"
    pages = overview.next_steps(run)["page"].to_list()
    assert {"Routing", "Super experts", "Local consistency", "Tokens"} <= set(pages)


def test_tokens_join_characters_that_are_split() -> None:
    pieces = ["日".encode()[:1], "日".encode()[1:], b"a", b"\xff", "é".encode()[:1]]
    assert tokens.decode(pieces) == [tokens.SPLIT, "日", "a", "\ufffd", "\ufffd"]
    assert tokens.decode([]) == []
    assert tokens.decode([b"", b"x"]) == ["", "x"]


def test_token_routes_match_the_trace(run: store.Run) -> None:
    trace = run.selections(sequences=[4])
    routes = tokens.token_routes(run, 4)
    assert len(routes) == len(LAYERS) * TOKENS * TOP_K
    row = routes.filter((pl.col("position") == 7) & (pl.col("layer") == 5) & (pl.col("rank") == 1)).row(0, named=True)
    assert row["expert"] == trace.ids[3, 0, 7, 1]
    part = tokens.routes(run, 4, first=10, last=29)
    coloured = token_measures.of_first(part, "5", token_measures.of_weights(part, "5"))
    assert coloured["position"].to_list() == list(range(10, 30))
    assert coloured["expert"].to_list() == trace.ids[3, 0, 10:30, 0].tolist()
    for value, weights in zip(coloured["value"], trace.weights[3, 0, 10:30].tolist(), strict=True):
        shares = [weight / sum(weights) for weight in weights]
        entropy = -sum(share * math.log(share) for share in shares if share) / math.log(len(shares))
        assert value == pytest.approx(entropy, abs=0.01)  # shares in 8 bits: 1/510 moves it by < 0.0084
    assert tokens.route_table(routes.filter(pl.col("position") == 7)).columns[0] == "layer"
    assert tokens.token_routes(run, 999).is_empty()
    assert tokens.sequence_tokens(run, 999).is_empty()


def test_tokens_without_text_are_positions(tmp_path: Path) -> None:
    with store.open_run(synthetic.finished(tmp_path, text=False, metrics=False)) as run:
        frame = tokens.sequence_tokens(run, 2)
    assert frame["position"].to_list() == list(range(TOKENS))
    assert frame["text"].null_count() == TOKENS


def test_frames_of_a_live_run(tmp_path: Path) -> None:
    synthetic.live(tmp_path, shards=2)
    with store.open_run(tmp_path / "growing.live") as run:
        assert load.expert_load(run)["tokens"].sum() == 6 * TOKENS * TOP_K * len(LAYERS)
        assert consistency.srp_model(run).is_empty()
        assert consistency.hit_rates(run).is_empty()
        assert consistency.key_numbers(run).is_empty()
        assert super_experts.thresholds(run).is_empty()
        assert not super_experts.output_maxima(run).is_empty()
        assert not alerts.alerts(run).is_empty()


def test_frames_of_a_live_run_without_shards(tmp_path: Path) -> None:
    synthetic.live(tmp_path, shards=0)
    with store.open_run(tmp_path / "growing.live") as run:
        for maker in (
            load.expert_load, load.balance, load.coverage, domains.domain_tokens, domains.domain_shares,
            domains.specialization, confidence.confidence, super_experts.output_maxima, super_experts.residual,
            consistency.srp_experts, overview.checks, alerts.alerts, tokens.sequences,
        ):  # fmt: skip
            assert maker(run).is_empty(), maker.__name__
        assert axes.phases(run) == []
        overview.key_figures(run), overview.next_steps(run)


def test_layer_labels_with_steps() -> None:
    assert axes.layer_label(3, 0) == "3"
    assert axes.layer_label(3, 2) == "3.2"
    frame = axes.with_label(pl.DataFrame({"layer": [3, 3], "step": [0, 2]}))
    assert frame["label"].to_list() == ["3", "3.2"]
