"""The router score that each family is listed with is the one that its gate weights follow."""

from __future__ import annotations

import pytest
import torch

from compressor.families import find_router_outputs, router_traits
from tests.profiler.capture.tiny import WATCHED, batch, build, recorded_calls

OTHERWISE = {
    "deepseek_v4": "square root of softplus",
    "phimoe": "sparsemixer: each choice is weighted within its own threshold",
    "zaya": "one expert per token: there is no ratio of weights",
}


@pytest.mark.parametrize("family", [family for family in WATCHED if family not in OTHERWISE])
def test_weights_follow_the_listed_score(family: str) -> None:
    model = build(family)
    with torch.no_grad(), recorded_calls(model) as calls:
        model(**batch(2, 8, padding="none"))
    for entry in calls:
        logits, traits = entry.logits[0].float(), entry.layer.traits
        chosen = entry.ids[0][:, :2]
        if traits.holds_probabilities:
            score = logits
            weights = entry.weights[0][:, :2] / entry.layer.router.per_expert_scale[chosen]  # type: ignore[union-attr]
        else:
            score = logits.softmax(-1) if traits.score == "softmax" else logits.sigmoid()
            weights = entry.weights[0][:, :2].float()
        score = score.gather(1, chosen)
        # Renormalising and scaling are the same for both, so the ratio of two weights is that of their scores.
        torch.testing.assert_close(weights[:, 0] * score[:, 1], weights[:, 1] * score[:, 0], rtol=1e-3, atol=1e-7)


def test_a_score_that_nobody_listed_is_unknown() -> None:
    class Config:
        scoring_func = "sqrtsoftplus"

    traits = router_traits(router_class="DeepseekV4TopKRouter", experts_class="DeepseekV4Experts", config=Config())
    assert traits.score == "unknown"


def test_router_outputs_are_found_by_kind_and_shape() -> None:
    logits, weights, ids = torch.randn(4, 8), torch.randn(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    found = find_router_outputs((logits, weights, ids), logits_index=0, top_k=2)
    assert found[0] is logits
    assert found[1] is ids
    assert find_router_outputs(weights[:, 0], logits_index=0, top_k=2) == (None, None)
