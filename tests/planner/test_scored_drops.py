"""Presets that rank by a score, against the same ranking from per-token values in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import planner
import store
from compressor.plan import DropStep, experts_after
from planner.drop import random as random_drop
from tests.planner.collected import task
from tests.planner.test_importance_scores import EXPERTS, Where, _easy_ep, _tcess
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import Array, LayerTokens, Tokenwise, observe, watched

RANKED: dict[str, Callable[[LayerTokens, Where], Array]] = {
    **{name: EXPERTS[name] for name in ("reap", "ean", "frequency", "gate_mass", "man", "msan", "masking_error")},
    "dern_score": EXPERTS["dern"],
    "easy_ep": _easy_ep,
    "tcess": lambda layer, where: _tcess(layer, where, 1),
}


@pytest.fixture(scope="module", params=("olmoe", "deepseek_v3"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[store.Run, Tokenwise]:
    model = build(request.param)
    return watched(model, tmp_path_factory.mktemp(request.param)), observe(model)


def _dropped(run: store.Run, **options: Any) -> dict[int, list[int]]:
    (step,) = planner.make(run, share=0.25, **options).steps
    assert isinstance(step, DropStep)
    return {layer.layer: list(layer.experts) for layer in step.layers}


def _lowest(values: NDArray[np.float64], groups: int) -> list[int]:
    """Two of eight experts: one of each of two groups, or the two lowest; of equal ones the higher."""
    ranks = [(float(f"{value:.6g}"), -expert) for expert, value in enumerate(values)]
    blocks = np.split(np.arange(8), groups)
    return sorted(-one[1] for block in blocks for one in sorted(ranks[expert] for expert in block)[: 2 // groups])


@pytest.mark.parametrize("preset", RANKED)
def test_dropped_experts_are_the_lowest_over_domains(case: tuple[store.Run, Tokenwise], preset: str) -> None:
    run, seen = case
    found = _dropped(run, preset=preset)
    groups = 2 if run.info.model_type == "deepseek_v3" else 1
    for layer in seen.layers:
        per_domain = [RANKED[preset](layer, seen.where(domain)) for domain in ("code", "german")]
        united = np.sum([values / np.abs(values).sum() for values in per_domain], axis=0)
        assert found[layer.layer.layer] == _lowest(united, groups)


@pytest.mark.parametrize("preset", ["reap", "frequency", "easy_ep"])
def test_one_domain_and_all_tokens(case: tuple[store.Run, Tokenwise], preset: str) -> None:
    run, seen = case
    groups = 2 if run.info.model_type == "deepseek_v3" else 1
    german, tokens = _dropped(run, preset=preset, domains=["german"]), _dropped(run, preset=preset, mix="tokens")
    for layer in seen.layers:
        assert german[layer.layer.layer] == _lowest(RANKED[preset](layer, seen.where("german")), groups)
        assert tokens[layer.layer.layer] == _lowest(RANKED[preset](layer, seen.where()), groups)


def test_groups_of_a_group_limited_router_stay_alike(case: tuple[store.Run, Tokenwise]) -> None:
    run, _ = case
    grouped = run.info.model_type == "deepseek_v3"
    for preset in ("set_search", "reap", "random", "m_smoe", "stun", "dern"):
        plan = planner.make(run, preset=preset, share=0.5)
        assert plan.source.layers[0].groups == (2 if grouped else 1)
        for experts in experts_after(plan).values():
            assert len(experts) == 4
            if grouped:
                assert sum(one.lead < 4 for one in experts) == 2


def test_kept_mass_is_the_part_of_the_score_that_stays(case: tuple[store.Run, Tokenwise]) -> None:
    run, seen = case
    plan = planner.make(run, preset="ean", share=0.25, mix="tokens")
    scores = {layer.layer.layer: RANKED["ean"](layer, seen.where()) for layer in seen.layers}
    after = experts_after(plan)
    kept = sum(values[[one.lead for one in after[layer, 0]]].sum() for layer, values in scores.items())
    assert plan.estimate.kept_mass == pytest.approx(kept / sum(values.sum() for values in scores.values()), rel=1e-4)
    assert planner.make(run, preset="reap", share=0.25).estimate.kept_mass is None  # means have no mass


def test_random_is_seeded_and_spread(case: tuple[store.Run, Tokenwise]) -> None:
    run, _ = case
    first, again, other = (_dropped(run, preset="random", seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    counts, asked = np.zeros(8), task(run)
    for seed in range(100):
        (step,) = random_drop.draft(asked, seed=seed).steps
        assert isinstance(step, DropStep)
        for layer in step.layers:
            counts[list(layer.experts)] += 1
    expected = counts.sum() / 8
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_budgeted_loses_less_of_the_score(case: tuple[store.Run, Tokenwise]) -> None:
    run, seen = case
    uniform = planner.make(run, preset="frequency", share=0.25, mix="tokens")
    options: dict[str, Any] = {"allocation": "budgeted", "weigh": "equal", "engine": "transformers"}
    budgeted = planner.make(run, preset="frequency", share=0.25, mix="tokens", **options)
    counts = {key: len(experts) for key, experts in experts_after(budgeted).items()}
    assert sum(counts.values()) == 6 * len(seen.layers) and min(counts.values()) >= 2
    assert budgeted.estimate.kept_mass >= uniform.estimate.kept_mass  # type: ignore[operator]
