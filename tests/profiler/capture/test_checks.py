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
from moescope.errors import CaptureError
from profiler.capture import observer, tap
from profiler.capture.provenance import fingerprint
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
        "output recomputed",
        "rows rebuild output",
        "router's choice ran",
        "router logits finite",
        "mask known",
        "outputs unchanged",
    }
    assert set(table["name"]) == names
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
    assert failed(model, tmp_path) == {"router's choice ran": [1]}
    assert block.gate.forward == router


def test_rows_that_do_not_rebuild_the_output_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(call: tap.ExpertsCall, layout: Any) -> tuple[Tensor, tap.TappedRows]:
        output, rows = tap.run_with_rows(call, layout)
        rows.token = rows.token.flip(0)
        return output, rows

    monkeypatch.setattr(observer, "run_with_rows", shuffled)
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


def test_a_layer_that_calls_its_experts_twice_is_an_error(tmp_path: Path) -> None:
    model = build("olmoe")
    block = model.model.layers[0].mlp
    whole = block.forward
    block.forward = lambda hidden: whole(whole(hidden))
    with (
        pytest.raises(CaptureError, match="was called twice in one forward"),
        profiler.watch(model, store=tmp_path, name="tiny"),
    ):
        model(**batch())


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
