"""Each self-check passes on a sound capture and fails on a broken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import Tensor, nn

import profiler
import store
from profiler.capture import blocks, tap
from profiler.capture.check_rows import FINDINGS
from profiler.capture.provenance import fingerprint
from profiler.capture.score_checks import TIES, steering
from store.info import badge
from tests.profiler.capture.tiny import batch, build


def failed(model: Any, folder: Path, **options: Any) -> dict[str, list[Any]]:
    """Names of the checks that are not passed, each with its layers."""
    with torch.no_grad(), profiler.watch(model, store=folder, name="tiny", **options) as session:
        model(**batch())
    assert session.path is not None
    table = store.open_run(session.path).table("check").filter(pl.col("status").is_in(["fail", "warning"]))
    return {name: table.filter(name=name)["layer"].to_list() for name in table["name"].unique()}


def test_a_sound_capture_passes_every_check(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny", level="activations") as session:
        model(**batch())
    assert session.path is not None
    table = store.open_run(session.path).table("check")
    names = {
        "layer seen",
        "selections add up",
        "expert ids in range",
        "experts distinct",
        "tokens reach experts",
        "gate weights finite",
        "output recomputed",
        "rows rebuild output",
        "outputs finite",
        "router's choice ran",
        "router logits finite",
        "scores shown",
        "scores are logits",
        "weights follow scores",
        "selection follows scores",
        "ties at the boundary",
        "mask known",
        "padding left out",
        "modules as written",
        "outputs unchanged",
    }
    assert set(table["name"]) == names
    assert table.filter(name="padding left out")["value"].to_list() == [9.0]
    assert all(detail.count(". ") == 0 and len(detail) > 20 for detail in table["detail"])
    assert table.filter(pl.col("name") != "outputs unchanged")["status"].unique().to_list() == ["pass"]
    assert table.filter(name="outputs unchanged")["status"].to_list() == ["skipped"]
    recomputed = table.filter(name="output recomputed")
    assert len(recomputed) == 4
    assert (recomputed["value"] < 1e-5).all()


def test_a_layer_that_is_not_called_fails(tmp_path: Path) -> None:
    model = build("olmoe")
    model.model.layers[2].mlp.forward = lambda hidden: hidden
    assert failed(model, tmp_path) == {"layer seen": [2]}


def test_experts_that_compute_something_else_fail(tmp_path: Path) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def wrong(self: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return ALL_EXPERTS_FUNCTIONS["batched_mm"](self, hidden, (ids + 1) % 8, weights)

    ALL_EXPERTS_FUNCTIONS["wrong"] = wrong
    try:
        model = build("olmoe")
        model.set_experts_implementation("wrong")
        assert failed(model, tmp_path) == {"output recomputed": [0, 1, 2, 3]}
    finally:
        del ALL_EXPERTS_FUNCTIONS["wrong"]


def test_a_block_that_runs_other_experts_than_its_router_chose_fails(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[1].mlp
    router = block.gate.forward

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(flat)
        return block.experts(flat, (ids + 1) % 8, weights).reshape(hidden.shape)

    block.forward = forward
    names = {"router's choice ran", "weights follow scores", "selection follows scores"}
    assert failed(model, tmp_path) == dict.fromkeys(names, [1])
    assert block.gate.forward == router


def test_rows_that_do_not_rebuild_the_output_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(call: tap.ExpertsCall, layout: Any) -> tap.TappedRows:
        rows = tap.run_with_rows(call, layout)
        rows.token = rows.token.flip(0)
        return rows

    monkeypatch.setattr(blocks, "run_with_rows", shuffled)
    assert failed(build("olmoe"), tmp_path, level="activations") == {"rows rebuild output": [0, 1, 2, 3]}


def test_ids_that_are_no_expert_fail_and_are_not_counted(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[1].mlp

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(flat)
        ids[0, 0] = 8
        return block.experts(flat, ids, weights).reshape(hidden.shape)

    block.forward = forward
    model.set_experts_implementation("eager")
    found = failed(model, tmp_path)
    assert found["expert ids in range"] == [1]
    assert found["selections add up"] == [1]


def test_rows_that_a_backend_hides_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tables = build("olmoe"), []
    for name in ("seen", "hidden"):
        with torch.no_grad(), profiler.watch(model, store=tmp_path, name=name, level="activations") as session:
            model(**batch())
        assert session.path is not None
        run = store.open_run(session.path)
        assert run.badge.status == "valid", run.badge.reason
        tables.append(run.table("expert_output").select("expert", "tokens", "norm_sum", "input_max", "output_max"))
        monkeypatch.setattr(tap._StandIn, "has_post_expert_norm", False)
    assert_frame_equal(*tables, rel_tol=1e-5)


def test_calls_with_other_rows_than_tokens_fail(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[3].mlp
    whole = block.forward

    def halves(hidden: Tensor) -> Tensor:
        return whole(hidden[:, :5].contiguous())  # a part of the tokens only

    block.forward = lambda hidden: torch.cat([halves(hidden), hidden[:, 5:]], 1)
    assert failed(model, tmp_path) == {"rows match tokens": [None], "layer seen": [3]}


def test_each_call_of_a_layer_that_calls_its_experts_twice_is_checked(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[1].mlp

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(flat)
        once = block.experts(flat, ids, weights)
        _, weights, ids = block.gate(once)
        return block.experts(once, (ids + 1) % 8, weights).reshape(hidden.shape)

    block.forward = forward
    found = failed(model, tmp_path)
    assert found["router's choice ran"] == [1]
    table = store.open_run(tmp_path / "tiny.duckdb").table("check").filter(name="router's choice ran", layer=1)
    assert table.sort("step").select("step", "status").rows() == [(0, "pass"), (1, "fail")]


def test_nan_that_an_expert_puts_out_fails(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[3, 5, 7] = torch.nan
    found = failed(model, tmp_path)
    assert 2 in found["outputs finite"]
    assert 2 in found["output recomputed"]  # NaN is within no tolerance
    assert 1 not in found["outputs finite"]


def test_gate_weights_that_are_no_numbers_fail(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[1].mlp

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(flat)
        weights = weights.clone()
        weights[0, 0] = torch.inf
        return block.experts(flat, ids, weights).nan_to_num(0.0, 0.0, 0.0).reshape(hidden.shape)

    block.forward = forward
    assert failed(model, tmp_path)["gate weights finite"] == [1]


def test_tokens_that_no_expert_works_on_are_a_warning(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[1].mlp

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(flat)
        return block.experts(flat, ids, weights * (torch.arange(len(flat)) % 6 != 0)[:, None]).reshape(hidden.shape)

    block.forward = forward
    assert failed(model, tmp_path) == {"tokens reach experts": [1]}
    table = store.open_run(tmp_path / "tiny.duckdb").table("check").filter(name="tokens reach experts", layer=1)
    assert table["status"].to_list() == ["warning"]
    assert table["value"].to_list() == [5.0]  # 0, 6, 12, 18 and 24 of 36 places are real tokens


def test_experts_called_outside_a_forward_are_noted_and_not_counted(tmp_path: Path) -> None:
    model = build("olmoe")
    with torch.no_grad(), profiler.watch(model, store=tmp_path, name="tiny") as session:
        model(**batch())
        model.model.layers[0](torch.randn(1, 3, 64), position_embeddings=(torch.ones(1, 3, 16), torch.zeros(1, 3, 16)))
    assert session.path is not None
    run = store.open_run(session.path)
    assert run.badge.status == "valid"
    assert run.table("check").filter(name="calls inside a forward")["value"].to_list() == [1.0]
    assert run.table("router_load")["tokens"].to_list() == [27] * 4


def test_fingerprints_depend_on_names_shapes_and_values() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(nn.Sequential(first)) != fingerprint(first)
    assert fingerprint(first) != fingerprint(first.to(torch.bfloat16))


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (128, 8), (256, 8)])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_rounding_to_bfloat16_alone_ties_less_than_the_check_allows(experts: int, top_k: int, scale: float) -> None:
    logits = torch.randn(4000, experts, generator=torch.Generator().manual_seed(0)) * scale
    largest = logits.bfloat16().topk(top_k + 1).values
    share = float((largest[:, -1] == largest[:, -2]).float().mean()) / top_k
    assert 0 < share < 0.6 * TIES


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("olmoe", [""] * 4),
        ("gpt_oss", [""] * 4),  # its bias is a part of the logits
        ("gemma4_text", [""] * 4),  # its scale per expert comes after the choice
        ("mistral4", ["groups of experts"] * 3),
        ("lfm2_moe", ["a selection bias (expert_bias)"] * 3),
        ("ernie4_5_moe", ["a selection bias (e_score_correction_bias)"] * 3),
        ("minimax_m2", ["a selection bias (e_score_correction_bias)"] * 4),  # which the block holds, not the router
        ("deepseek_v4", [*["a table of token ids"] * 3, "a selection bias (e_score_correction_bias)"]),
    ],
)
def test_what_else_than_scores_decides_is_known(family: str, expected: list[str]) -> None:
    model = build(family)
    assert [steering(layer, model) for layer in profiler.find_moe_layers(model)] == expected


def test_a_badge_names_every_check_that_turned_it() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "mask known", "status": "warning", "detail": "2 forwards"},
        {"name": "layer seen", "status": "fail", "detail": "layer 1"},
        {"name": "layer seen", "status": "fail", "detail": "layer 3"},
        {"name": "outputs unchanged", "status": "pass", "detail": "0"},
    ]
    verdict = badge(rows)
    assert verdict.status == "invalid"
    assert verdict.reasons == ("layer seen: layer 1 (and 1 more)", "mask known: 2 forwards")
    assert badge(rows[3:]).reasons == ()


def test_the_page_on_checks_names_them_all(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "checks.md").read_text(encoding="utf-8")
    named = {name for line in page.splitlines() if line.startswith("| ") for name in line.split("|")[1].split(", ")}
    named = {name.replace("(sampled)", "").strip() for name in named}
    with torch.no_grad(), profiler.watch(build("olmoe"), store=tmp_path, name="tiny", level="activations") as session:
        session.model(**batch(4, 20))
    assert session.path is not None
    found = set(store.open_run(session.path).table("check")["name"])
    assert (
        found | {name for name, _, _ in FINDINGS.values()} - {"calls inside a forward", "forwards completed"} <= named
    )
