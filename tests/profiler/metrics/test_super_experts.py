"""Both rules for super experts on hand-built arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from moescope.errors import MetricError
from profiler.metrics.super_experts import (
    SuperExpert,
    fill_never_used,
    forming_layers,
    massive_activation_layers,
    super_experts,
    super_experts_code,
)


def outputs(layers: int = 48, experts: int = 16, **large: float) -> NDArray[np.float64]:
    """Small values with some large ones: l1_e6=744 puts 744 at layer 1, expert 6."""
    values = np.random.default_rng(0).uniform(1, 5, size=(layers, experts))
    for place, value in large.items():
        layer, expert = (int(part[1:]) for part in place.split("_"))
        values[layer, expert] = value
    return values


def found_in(result: Any) -> list[tuple[int, str, int]]:
    return [(one.layer, one.kind, one.expert) for one in result.experts]


def test_paper_rule() -> None:
    values = outputs(l1_e6=744.0, l2_e9=540.0, l3_e8=430.0, l40_e5=200.0, l5_e5=63.5)
    found = super_experts(output_max=values, layers=range(48), massive_layers=[1, 2, 3, 4, 5])
    assert found.experts == [
        SuperExpert(1, "routed", 6, 744.0),
        SuperExpert(2, "routed", 9, 540.0),
        SuperExpert(3, "routed", 8, 430.0),
    ]
    assert [(one.layer, one.value) for one in found.candidates] == [(40, 200.0)]
    assert found.percentile_threshold == np.percentile(values, 99.5)
    assert found.max_threshold == pytest.approx(74.4)
    assert found.notes == []


def test_the_percentile_binds_when_outliers_are_many() -> None:
    values = np.ones((10, 100))
    values[0, :20] = np.arange(100, 120)
    found = super_experts(output_max=values, layers=range(10), massive_layers=range(10))
    assert len(found.experts) == 5  # 0.5 % of 1000, though all 20 exceed a tenth of the maximum


def test_comparisons_are_strict() -> None:
    values = np.ones((5, 100))
    values[0, 0], values[0, 1] = 100.0, 10.0
    assert len(super_experts(output_max=values, layers=range(5), massive_layers=[0]).experts) == 1
    values[0, 1] = 10.001
    assert len(super_experts(output_max=values, layers=range(5), massive_layers=[0]).experts) == 2
    values[0, :2] = [109.0, 10.0]  # floor(109 / 10) = 10 is not exceeded
    assert len(super_experts_code(output_max=values, layers=range(5), num_hidden_layers=5).experts) == 1
    values[0, :2] = [109.0, 10.5]  # 10.5 > 10 by the code's floor, but not > 10.9
    assert len(super_experts_code(output_max=values, layers=range(5), num_hidden_layers=5).experts) == 2
    assert len(super_experts(output_max=values, layers=range(5), massive_layers=[0]).experts) == 1


@pytest.mark.parametrize(
    ("decoder_layers", "included"), [(48, 36), (61, 46), (27, 20), (32, 24), (2, 2), (6, 4), (10, 8)]
)
def test_code_rule_rounds_halves_to_even(decoder_layers: int, included: int) -> None:
    values = outputs(layers=decoder_layers, experts=300)
    found = super_experts_code(output_max=values, layers=range(decoder_layers), num_hidden_layers=decoder_layers)
    assert found.considered.any(axis=1).sum() == included
    assert found.percentile_threshold == np.percentile(values[:included], 99.5)


def test_code_rule_looks_at_the_first_layers_only() -> None:
    values = outputs(layers=8, experts=60, l1_e6=744.0, l7_e5=9000.0)
    found = super_experts_code(output_max=values, layers=range(8), num_hidden_layers=8)
    assert found_in(found) == [(1, "routed", 6)]  # the last layer neither counts nor lifts the thresholds
    assert found.max_threshold == 74.0
    dense = super_experts_code(output_max=values, layers=range(3, 11), num_hidden_layers=11)
    assert found_in(dense) == [(4, "routed", 6)]  # round(8.25) = 8: three dense layers count
    none = super_experts_code(output_max=values, layers=range(20, 28), num_hidden_layers=20)
    assert none.experts == [] and "first 15 of 20 decoder layers" in none.notes[0]


def test_shared_experts_are_members() -> None:
    routed = outputs(layers=20, experts=30, l4_e2=50.0)
    shared = np.full((20, 2), np.nan)
    shared[6, 1] = 536.0
    found = super_experts(output_max=routed, shared_output_max=shared, layers=range(3, 23), massive_layers=range(23))
    assert found_in(found) == [(9, "shared", 1)]
    assert found.considered.sum() == 601
    assert found.max_threshold == pytest.approx(53.6)  # the shared expert's value lifts the threshold over 50


def test_never_used_experts_are_left_out_or_zero() -> None:
    values = outputs(layers=10, experts=40, l1_e6=744.0)
    values[5] = np.nan
    found = super_experts(output_max=values, layers=range(10), massive_layers=[1])
    assert found.percentile_threshold == np.nanpercentile(values, 99.5)
    assert found.considered.sum() == 360
    filled = super_experts(output_max=fill_never_used(output_max=values), layers=range(10), massive_layers=[1])
    assert filled.considered.sum() == 400
    assert filled.percentile_threshold < found.percentile_threshold
    assert found_in(found) == found_in(filled) == [(1, "routed", 6)]


def test_kurtosis_equals_scipy() -> None:
    values = outputs(layers=10, experts=40, l1_e6=744.0)
    found = super_experts(output_max=values, layers=range(10), massive_layers=[1])
    np.testing.assert_allclose(found.layer_kurtosis, stats.kurtosis(values, axis=1))
    np.testing.assert_allclose(found.expert_kurtosis, stats.kurtosis(values, axis=0))
    values[0, 1:] = np.nan
    assert np.isnan(super_experts(output_max=values, layers=range(10)).layer_kurtosis[0])


def test_weak_verdicts_say_so() -> None:
    few = super_experts(output_max=outputs(layers=4, experts=8), layers=range(4))
    assert "Only 32 experts" in few.notes[0] and "at most one" in few.notes[0]
    assert "massive activations are not known" in few.notes[1]
    none = super_experts(output_max=outputs(), layers=range(48), massive_layers=[])
    assert none.experts == [] and "no expert can be a super expert" in none.notes[-1]
    assert len(none.candidates) >= 1


@pytest.mark.parametrize(("count", "most"), [(201, 1), (202, 2)])
def test_where_the_note_begins(count: int, most: int) -> None:
    values = np.arange(1.0, count + 1)[None]
    found = super_experts(output_max=values, layers=[0], massive_layers=[0])
    assert len(found.experts) == most
    assert bool(found.notes) == (most == 1)


def test_massive_activation_layers() -> None:
    arguments: dict[str, Any] = {
        "residual_max": [99, 101, 5000, 5000, np.nan],
        "residual_median": [0.01, 0.11, 5, 5.01, 1],
    }
    assert massive_activation_layers(**arguments, layers=range(5)) == [2]
    assert massive_activation_layers(**arguments, layers=range(5), absolute=50, ratio=900) == [0, 1, 2, 3]


def test_forming_layers_are_those_that_add() -> None:
    # Grows in layers 1 to 3, stays, grows a little in 6, and is cancelled in the last layer.
    arguments: dict[str, Any] = {
        "residual_max": [5, 400, 900, 2000, 1990, 1995, 2025, 30],
        "residual_median": [0.3] * 8,
        "layers": range(8),
    }
    assert massive_activation_layers(**arguments) == [1, 2, 3, 4, 5, 6]
    assert forming_layers(**arguments) == [1, 2, 3, 6]
    assert forming_layers(**arguments, growth=0.02) == [1, 2, 3]
    assert forming_layers(**arguments, growth=0.0) == [1, 2, 3, 5, 6]
    assert forming_layers(**arguments, growth=0.3) == [1, 3]  # the first massive layer counts whatever it adds
    assert forming_layers(**arguments, absolute=3000) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_max": np.full((2, 3), np.nan)}, "holds no value"),
        ({"output_max": np.array([[1.0, 2, 3], [1, np.inf, 3]])}, "layer 7, column 1 is inf"),
        ({"output_max": np.array([[1.0, -2, 3], [1, 1, 3]])}, r"layer 4, column 1 is -2\.0"),
        ({"output_max": np.ones((3, 3))}, r"has shape \(3, 3\); it takes \(layers, experts\) with 2 layers"),
        ({"shared_output_max": np.ones(2)}, r"has shape \(2,\)"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        super_experts(**{"output_max": np.ones((2, 3)), "layers": [4, 7], **changes})


def test_says_what_is_wrong_with_the_residual() -> None:
    with pytest.raises(MetricError, match="take one value per layer"):
        massive_activation_layers(residual_max=[1, 2], residual_median=[1], layers=[0, 1])
