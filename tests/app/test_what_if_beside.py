"""A fixed number of experts stands beside a rule on the tokens and layers that the rule was tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from app.exhibits import what_if as exhibits
from app.exhibits.exhibit import fresh


def test_a_fixed_number_rests_on_the_same_tokens_and_layers(tmp_path: Path) -> None:
    """Sequence 0, which has scores, is decided (0.9 : 0.1), the other is not (0.5 : 0.5); layer 1 has one expert."""
    sequence, position = np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    place: dict[str, Any] = {"sequence": sequence, "position": position}
    weights = np.where(sequence[:, None] == 0, [[0.9, 0.1]], [[0.5, 0.5]])
    ids, logits = np.tile([0, 1, 2], (20, 1)), np.tile([2.0, 0.0, -1.0], (20, 1))
    scored: dict[str, Any] = {name: values[:10] for name, values in {**place, "ids": ids, "logits": logits}.items()}
    total = np.log(np.exp(logits[:10]).sum(1))
    shard: dict[str, Any] = {
        "route_chunk": pl.concat(
            [
                store.pack_trace(layer=0, ids=ids[:, :2], weights=weights, num_experts=3, **place),
                store.pack_trace(layer=1, ids=ids[:, :1], weights=np.ones((20, 1)), num_experts=3, **place),
            ]
        ),
        "score_chunk": pl.concat([store.pack_scores(layer=one, log_partition=total, **scored) for one in (0, 1)]),
        "layer": {"layer": [0, 1], "step": [0, 0], "num_experts": [3, 3], "top_k": [2, 1]},
        "sequence": {"sequence": [0, 1], "domain": ["a", "a"], "tokens": [10, 10]},
    }
    writer = store.RunWriter.create(tmp_path, "known", store.RunInfo(model="toy", hidden_size=8))
    writer.write_shard(shard)
    run = store.open_run(writer.finish(seconds=1.0))
    for method, kept in (("null_experts", 0.9), ("ratio", 0.7)):
        result = exhibits.looked(run, method=method)
        beside = exhibits.fixed_beside(run, fresh, result, None, False, method=method)
        assert beside is not None and beside["mean_active"].to_list() == [1.0, 2.0]
        assert beside["kept_mass"].to_list() == pytest.approx([kept, 1.0], abs=2e-3)
