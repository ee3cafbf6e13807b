"""Means from sums and percentiles from histograms against the values of single tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from moescope.errors import MetricError
from profiler.metrics.confidence import percentiles, router_confidence, token_confidence

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(0, 2, size=(500, 8))
CHOSEN = np.argsort(-LOGITS, axis=1)[:, :3]
WEIGHTS = np.take_along_axis(special.softmax(LOGITS, axis=1), CHOSEN, axis=1)


def test_tokens_against_scipy() -> None:
    found = token_confidence(logits=LOGITS, selections=CHOSEN, weights=WEIGHTS)
    p = special.softmax(LOGITS, axis=1)
    np.testing.assert_allclose(found.entropy, stats.entropy(p, axis=1), atol=1e-12)
    np.testing.assert_allclose(found.normalised_entropy, stats.entropy(p, axis=1, base=8), atol=1e-12)
    np.testing.assert_allclose(found.top_probability, p.max(axis=1))
    np.testing.assert_allclose(found.selected_probability, np.sort(p, axis=1)[:, -3:].sum(axis=1))
    ordered = np.sort(LOGITS, axis=1)
    np.testing.assert_allclose(found.first_margin, ordered[:, -1] - ordered[:, -2])
    np.testing.assert_allclose(found.boundary_margin, ordered[:, -3] - ordered[:, -4])
    np.testing.assert_allclose(found.z_loss, np.log(np.exp(LOGITS).sum(axis=1)) ** 2)
    np.testing.assert_allclose(found.weight_entropy, stats.entropy(WEIGHTS, axis=1), atol=1e-12)


def test_variable_selections_and_sigmoid_scores() -> None:
    selections = CHOSEN.copy()
    selections[:, 2] = -1
    selections[0] = -1
    bias = np.linspace(0, 3, 8)
    found = token_confidence(
        logits=LOGITS, selections=selections, scores=special.expit(LOGITS) + bias, probability="sigmoid"
    )
    p = special.expit(LOGITS) / special.expit(LOGITS).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.selected_probability[1:], np.take_along_axis(p, CHOSEN[:, :2], 1).sum(axis=1)[1:])
    assert found.selected_probability[0] == 0 and np.isnan(found.boundary_margin[0])
    scores = np.sort(special.expit(LOGITS) + bias, axis=1)
    np.testing.assert_allclose(found.boundary_margin[1:], (scores[:, -2] - scores[:, -3])[1:])
    assert np.isnan(found.weight_entropy).all()


def test_means_from_sums() -> None:
    tokens = token_confidence(logits=LOGITS, selections=CHOSEN, weights=WEIGHTS)
    names = ["entropy", "top_probability", "selected_probability", "first_margin", "boundary_margin", "weight_entropy"]
    sums: dict[str, Any] = {f"{name}_sum": [getattr(tokens, name).sum(), 0.0] for name in names}
    sums["log_partition_square_sum"] = [tokens.z_loss.sum(), 0.0]
    found = router_confidence(tokens=[500, 0], num_experts=8, **sums)
    for name in [*names, "normalised_entropy", "z_loss"]:
        mean, empty = getattr(found, name)
        assert mean == pytest.approx(getattr(tokens, name).mean(), abs=1e-12)
        assert np.isnan(empty)


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_percentiles_are_exact_to_a_bin(seed: int, bins: int) -> None:
    values = np.random.default_rng(seed).beta(2, 5, size=300)
    edges = np.linspace(0, 1, bins + 1)
    counts, _ = np.histogram(values, edges)
    found = percentiles(lower=edges[:-1], upper=edges[1:], tokens=counts, percents=[0, 10, 50, 90, 100])
    expected = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf")
    assert (np.abs(found - expected) <= 1 / bins + 1e-12).all()
    assert (np.diff(found) >= 0).all()


def test_percentiles_interpolate_inside_the_bin() -> None:
    counts = [[4, 0, 4], [0, 0, 0]]
    found = percentiles(lower=[0, 1, 2], upper=[1, 2, 4], tokens=counts, percents=[25, 50, 75])
    assert found[0].tolist() == [0.5, 1.0, 3.0]
    assert np.isnan(found[1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": [1, 2, 3]}, "do not share their bins"),
        ({"lower": [1, 0]}, "ascend and do not overlap"),
        ({"tokens": [1, -2]}, "negative or NaN"),
        ({"tokens": [1, np.nan]}, "negative or NaN"),
        ({"percents": [101]}, "a percent lies between 0 and 100"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        percentiles(**{"lower": [0, 1], "upper": [1, 2], "tokens": [1, 1], **changes})


def test_says_what_is_wrong_with_a_router() -> None:
    with pytest.raises(MetricError, match="num_experts is 1"):
        token_confidence(logits=np.zeros((3, 1)), selections=np.zeros((3, 1), int))
    with pytest.raises(MetricError, match=r"logits \(2, 4\) and selections \(3, 1\)"):
        token_confidence(logits=np.zeros((2, 4)), selections=np.zeros((3, 1), int))
    zeros: dict[str, Any] = dict.fromkeys(
        [f"{name}_sum" for name in ("entropy", "top_probability", "selected_probability", "first_margin")]
        + ["boundary_margin_sum", "log_partition_square_sum", "weight_entropy_sum"],
        0.0,
    )
    with pytest.raises(MetricError, match="tokens holds -1"):
        router_confidence(tokens=-1, num_experts=4, **zeros)
