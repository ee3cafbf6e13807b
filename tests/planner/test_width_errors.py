"""What widths cost: typical errors computed again, and both ways to know them from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose

from compressor.edits.quantize import to_grid
from compressor.plan import BITS, QuantizeStep
from moescope.errors import PlanError
from planner.quantize.errors import TYPICAL, LayerErrors, layer_errors
from planner.task import Task
from tests.planner.collected import collected, task
from tests.profiler.capture.tiny import build

PARTS = ("all", "gate", "up", "down")


def test_typical_errors_are_those_of_gaussian_weights() -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(5))
    step = QuantizeStep(method="", layers=())
    assert (step.group_size, step.scales, step.symmetric) == (128, "clipped", False)
    found = [
        float((to_grid(weight, bits, step).values() - weight).square().sum() / weight.square().sum()) for bits in BITS
    ]
    assert_allclose(TYPICAL, found, rtol=0.03)


def short() -> Any:
    """Two layers with shared experts."""
    return build("qwen2_moe", num_hidden_layers=2, layer_types=["full_attention"] * 2)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Level errors alone, every token in the sample; a model with shared experts."""
    return task(collected(short(), tmp_path_factory.mktemp("measured"), level="errors", errors_every=1))


@pytest.fixture(scope="module")
def typical(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The same text at level activations."""
    return task(collected(short(), tmp_path_factory.mktemp("typical"), level="activations"))


def _sums(of: Task, layer: int, kind: str, part: str, column: str) -> dict[int, Any]:
    """Expert -> the column's sum over domains and phases."""
    rows = of.run.table("expert_error").filter(
        pl.col("domain").is_in([*of.domains, ""]), layer=layer, kind=kind, part=part
    )
    found: dict[int, Any] = {}
    for row in rows.to_dicts():
        found[row["expert"]] = np.array(row[column]) + found.get(row["expert"], 0)
    return found


def test_measured_errors_are_parts_of_the_layers_output(measured: Task) -> None:
    found = layer_errors(measured)
    assert layer_errors(measured) is found  # worked out once
    assert set(found) == {shape.key for shape in measured.source.layers}
    for (layer, _), errors in found.items():
        assert errors.measured
        energy = _sums(measured, layer, "routed", "all", "gated_output_square_sum")
        whole = sum(energy.values())
        assert errors.energy.sum() == pytest.approx(1.0)
        assert_allclose(errors.energy[list(energy)], [value / whole for value in energy.values()])
        for kind, values in (("routed", errors.errors), ("shared", errors.shared_errors)):
            for part in PARTS:
                expected = _sums(measured, layer, kind, part, "gated_error_square_sum")
                dense = np.zeros_like(values[part])
                dense[list(expected)] = np.stack(list(expected.values())) / whole
                assert_allclose(values[part], dense, err_msg=f"{kind} {part}")
                assert (np.diff(values[part].sum(0)[[0, 2, 3, 4, 5]]) < 0).all()
        nested = _sums(measured, layer, "routed", "all", "nested_error_square_sum")
        assert_allclose(errors.nested[list(nested)], np.stack(list(nested.values())) / whole)
        assert_allclose(errors.nested[:, 0], errors.errors["all"][:, BITS.index(2)])
        assert errors.shared_energy.shape == (1,)
        assert errors.tokens.sum() == 2 * _tokens(measured)  # top-2


def _tokens(of: Task) -> int:
    return int(of.run.table("sequence")["tokens"].sum())


def test_one_domain_counts_its_own_tokens(measured: Task) -> None:
    german = layer_errors(task(measured.run, domains=("german",)))
    for key, errors in layer_errors(measured).items():
        assert 0 < german[key].tokens.sum() < errors.tokens.sum()
        assert (german[key].tokens <= errors.tokens).all()
        # Single projections are pooled over domains: a domain has them by the part of the output that they change.
        used = german[key].energy > 0
        for part in ("gate", "up", "down"):
            own = german[key].errors[part][used] / german[key].energy[used, None]
            assert_allclose(own, errors.errors[part][used] / errors.energy[used, None], rtol=1e-12)


def test_unused_experts_cost_nothing(tmp_path: Path) -> None:
    run = collected(build("olmoe", num_hidden_layers=2), tmp_path, level="errors", errors_every=24)
    of = task(run)
    for (layer, _), errors in layer_errors(of).items():
        idle = sorted(set(range(8)) - set(_sums(of, layer, "routed", "all", "tokens")))
        assert idle
        assert not errors.energy[idle].any() and not errors.errors["all"][idle].any() and not errors.tokens[idle].any()


def test_typical_errors_where_none_were_recorded(measured: Task, typical: Task) -> None:
    for key, errors in layer_errors(typical).items():
        assert not errors.measured
        # Every token was in the sample of the other run, so both know the same energies.
        assert_allclose(errors.energy, layer_errors(measured)[key].energy, rtol=1e-4)
        assert_allclose(errors.shared_energy, layer_errors(measured)[key].shared_energy, rtol=1e-4)
        assert_allclose(errors.errors["all"], np.outer(errors.energy, TYPICAL))
        assert np.isnan(errors.nested).all()
        assert not errors.tokens.any()
        assert_allclose(sum(errors.errors[part] for part in PARTS[1:]), errors.errors["all"])


def test_an_expert_without_gate_spreads_over_two_parts(tmp_path: Path) -> None:
    both = [
        _first(task(collected(build("nemotron_h"), tmp_path / level, level=level, errors_every=1)))
        for level in ("errors", "activations")
    ]
    assert [errors.measured for errors in both] == [True, False]
    for errors in both:
        assert not errors.errors["gate"].any()
        assert errors.errors["up"].any() and errors.errors["down"].any()


def _first(of: Task) -> LayerErrors:
    return next(iter(layer_errors(of).values()))


def test_a_run_that_knows_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="collect it with --level errors, or at least --level activations"):
        layer_errors(task(collected(build("olmoe", num_hidden_layers=2), tmp_path, level="routing")))
