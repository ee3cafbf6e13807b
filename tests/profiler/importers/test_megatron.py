"""The router trace of Megatron Core, written as its tracer writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.errors import ImportFileError
from tests.profiler.importers.fixtures import CONFIG
from tests.profiler.importers.traces import bring_in, left_behind, selections_of


def _line(step: int, layer: int, ids: Sequence[Sequence[int]], **more: Any) -> dict[str, Any]:
    record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
    return {**record, "num_tokens": len(ids), "topk": len(ids[0]), "top_indices": ids, **more}


def _write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_counts_per_step_and_layer(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "router_trace_rank0.jsonl",
        _line(0, 1, [[0, 2], [1, 2]]), _line(0, 3, [[0, 3], [0, 1]]), _line(0, 0, [[3, 1]], block="mtp", mtp_idx=0),
        # Two micro-batches in step 1, as with gradient accumulation.
        _line(1, 1, [[0, 1]]), _line(1, 3, [[2, 3]]), _line(1, 1, [[0, 3]]), _line(1, 3, [[1, 2]]),
    )  # fmt: skip
    run = bring_in("megatron", tmp_path, tmp_path / "runs", num_experts=4)
    assert selections_of(run) == {
        (1, 0): 3, (1, 1): 2, (1, 2): 2, (1, 3): 1, (3, 0): 2, (3, 1): 2, (3, 2): 2, (3, 3): 2,
    }  # fmt: skip
    spans = {(layer, span): row for layer, span, row in run.table("load_span").select("layer", "span", "tokens").rows()}
    assert spans[1, 0] == [1, 1, 2, 0] and spans[3, 1] == [0, 1, 2, 1]
    assert [(layer.layer, layer.top_k) for layer in run.layers] == [(1, 2), (3, 2)]
    assert not run.has_trace and "sequence" in run.omissions["order"]
    assert run.info.tokens == 4
    checks = dict(run.table("check").select("name", "status").iter_rows())
    assert (checks["layers complete"], checks["layers left out"]) == ("pass", "warning")
    assert file.exists()


def test_a_layer_without_its_line_is_noted(tmp_path: Path) -> None:
    file = _write(tmp_path / "t.jsonl", _line(0, 0, [[0]]), _line(0, 1, [[1]]), _line(1, 0, [[1]]))
    run = bring_in("megatron", file, tmp_path / "runs", num_experts=2)
    assert dict(run.table("check").select("name", "status").iter_rows())["layers complete"] == "warning"


def test_layers_counted_from_one(tmp_path: Path) -> None:
    # inference with routing replay writes Megatron's layer_number; by the configuration, layers 1 and 2 are routed
    file = _write(tmp_path / "t.jsonl", _line(0, 2, [[3, 1], [0, 2]]), _line(0, 3, [[1, 2], [1, 0]]))
    run = bring_in("megatron", file, tmp_path / "runs", config=CONFIG)
    assert selections_of(run) == {(1, 0): 1, (1, 1): 1, (1, 2): 1, (1, 3): 1, (2, 0): 1, (2, 1): 2, (2, 2): 1}
    assert run.info.settings["first_layer"] == 1


_MANY = np.argsort(np.random.default_rng(0).random((16, 4)), axis=1)[:, :2].tolist()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([_line(0, 0, [[0, 4]])], "expert 4 is out of range"),
        ([_line(0, 0, [[1, 1]])], "a token has an expert twice"),
        ([_line(0, 0, [[0, 1]], topk=3)], r"num_tokens and topk \(1, 3\)"),
        ([_line(0, 0, [[0.5, 1]])], "they are integers"),
        ([_line(0, 0, [[0, 1], [2]])], "different numbers of experts"),
        ([_line(0, 0, [[0, 1]]), _line(1, 7, [[0, 1]])], "step 1 has layer 7, the first step had none"),
        ([_line(4, 0, [[0, 1]]), _line(3, 0, [[0, 1]])], "step 3 stands after step 4"),
        ([_line(0, 0, _MANY), _line(0, 0, _MANY)], "same selections of layer 0 twice"),
        ([_line(0, -1, [[0, 1]])], "layer is '-1'"),
        (['{"step": 0'], "line 1 is no JSON"),
        (["[1]"], "line 1 has no top_indices"),
        ([], "holds no line of a decoder layer"),
    ],
)
def test_what_is_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    file = _write(tmp_path / "t.jsonl", *lines)
    with pytest.raises(ImportFileError, match=message):
        bring_in("megatron", file, tmp_path / "runs", num_experts=4)
    assert left_behind(tmp_path / "runs") == []


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        _write(tmp_path / f"router_trace_rank{rank}.jsonl", _line(0, 0, [[0, 1]]))
    with pytest.raises(ImportFileError, match="has 2 files router_trace_rank"):
        bring_in("megatron", tmp_path, tmp_path / "runs", num_experts=4)
