"""What scores do at the edges: equal values, experts that hold nothing, domains without tokens, wrong numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import planner.importance as importance
import store
from moescope.errors import PlanError


def test_smallest_set_of_equal_values() -> None:
    scores = pl.DataFrame({"layer": 0, "step": 0, "expert": range(4), "kind": "routed", "value": 0.25})
    assert importance.smallest_set(scores, share=0.5)["chosen"].to_list() == [True, True, False, False]
    assert importance.smallest_set(scores, share=0.51)["chosen"].to_list() == [True, True, True, False]
    for share in (0.0, 1.5):
        with pytest.raises(PlanError, match=r"outside \(0, 1\]"):
            importance.smallest_set(scores, share=share)
    with pytest.raises(PlanError, match="a score per expert"):
        importance.smallest_set(scores.with_columns(neuron=pl.lit(0)), share=0.5)


def test_experts_without_weights_are_not_scored(tmp_path: Path) -> None:
    """Zero, copy and constant experts can be chosen, but hold nothing that could be cut."""
    writer = store.RunWriter.create(tmp_path, "zero", store.RunInfo(model="toy"))
    key = {"layer": 0, "step": 0}
    group = {**key, "domain": "text", "phase": "prompt"}
    kinds = ["routed", "routed", "zero", "copy"]
    writer.write_shard(
        {
            "layer": pl.DataFrame([{**key, "num_experts": 4, "top_k": 2}]),
            "expert": pl.DataFrame([{**key, "expert": number, "kind": kind} for number, kind in enumerate(kinds)]),
            "router_load": pl.DataFrame([{**group, "tokens": 7}]),
            "expert_load": pl.DataFrame([{**group, "expert": e, "kind": "routed", "tokens": 5 - e} for e in range(4)]),
        }
    )
    frame = importance.score(store.open_run(writer.finish(seconds=1.0)), "frequency")
    assert frame["expert"].to_list() == [0, 1]
    assert frame["value"].to_list() == [5.0, 4.0]


def test_easy_ep_mixes_the_domains_that_a_phase_has(tmp_path: Path) -> None:
    writer = store.RunWriter.create(tmp_path, "phases", store.RunInfo(model="toy"))
    key = {"layer": 0, "step": 0}
    parts = [("code", "decode", (1, 3)), ("code", "prompt", (2, 2)), ("math", "prompt", (9, 3))]
    rows = [
        {**key, "expert": e, "kind": "routed", "domain": domain, "phase": phase, "tokens": 1, "shifted_tokens": 1,
         "shifted_gated_norm_sum": value}
        for domain, phase, values in parts
        for e, value in enumerate(values)
    ]  # fmt: skip
    load = [{**key, "domain": domain, "phase": "prompt", "tokens": 2} for domain in ("code", "math")]
    layer = [{**key, "num_experts": 2, "top_k": 1}]
    tables = {"layer": layer, "router_load": load, "expert_output": rows}
    writer.write_shard({name: pl.DataFrame(part) for name, part in tables.items()})
    run = store.open_run(writer.finish(seconds=1.0))
    assert importance.score(run, "easy_ep", phase="decode")["value"].to_list() == [0.25, 0.75]
    assert importance.score(run, "easy_ep", phase="prompt")["value"].to_list() == [0.5 + 0.75, 0.5 + 0.25]
    with pytest.raises(PlanError, match="has no token with domain 'math' and phase 'decode'"):
        importance.score(run, "easy_ep", domain="math", phase="decode")


def test_a_table_without_the_column_counts_as_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = store.RunWriter.create(tmp_path, "older", store.RunInfo(model="toy"))
    writer.write_shard({"layer": {"layer": [0], "step": [0], "num_experts": [2], "top_k": [1]}})
    run = store.open_run(writer.finish(seconds=1.0))
    table = run.table
    monkeypatch.setattr(run, "table", lambda name: table(name).drop("gate_share_sum", strict=False))
    with pytest.raises(PlanError, match="has no expert_load.gate_share_sum: collect it with --level routing"):
        importance.score(run, "dern")


def test_set_error_refuses_what_is_no_layer() -> None:
    gram = np.eye(8)
    with pytest.raises(PlanError, match=r"expert 8 is not in this layer: it has experts 0\.\.7"):
        importance.set_error(gram, [1, 8])
    with pytest.raises(PlanError, match="takes \\(experts, experts\\)"):
        importance.set_error(gram[:2], [1])
