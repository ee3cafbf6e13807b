"""Set search against all sets, the Gram matrix against per-token outputs, and domains told apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

import planner
import planner.importance as importance
import store
from compressor.plan import DropStep, LayerShape, Plan, experts_after
from moescope.errors import PlanError
from planner.drop import set_search
from planner.drop.set_search import marginal_errors, masked_sets
from planner.grams import domain_grams, mixed_gram
from tests.app import synthetic
from tests.planner.collected import sample, task
from tests.profiler.capture.tiny import build
from tests.profiler.recorders.tokenwise import Tokenwise, cosine, observe, watched

Array = NDArray[np.float64]


def _gram(seed: int, experts: int) -> Array:
    """Sums over tokens of products of gated outputs, for experts that are alike in part."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(experts, 6)) * generator.lognormal(0, 0.7, size=(experts, 1))
    return rows @ rows.T * generator.uniform(0.2, 1) + np.diag(generator.uniform(0, 2, experts))


def _cheapest(gram: Array, count: int, *, groups: int = 1, protected: tuple[int, ...] = ()) -> float:
    experts = len(gram)
    free = [one for one in range(experts) if one not in protected]
    size = experts // groups
    prices = [
        gram[np.ix_(chosen, chosen)].sum()
        for chosen in itertools.combinations(free, count)
        if len({sum(one // size == group for one in chosen) for group in range(groups)}) == 1
    ]
    return float(min(prices))


@pytest.mark.parametrize(("groups", "protected"), [(1, ()), (1, (2, 5)), (2, ()), (2, (0,))])
@pytest.mark.parametrize("seed", range(4))
def test_found_sets_are_the_cheapest_of_all(seed: int, groups: int, protected: tuple[int, ...]) -> None:
    gram = _gram(seed, 10)
    shape = LayerShape(layer=0, num_experts=10, top_k=1, width=4, groups=groups)
    for mask in masked_sets(gram, shape, protected, 6):
        assert not mask[list(protected)].any()
        if mask.any():
            best = _cheapest(gram, int(mask.sum()), groups=groups, protected=protected)
            assert gram[np.ix_(mask, mask)].sum() == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_where_not_all_are_priced_no_swap_helps(seed: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_search, "EVERY_SET", 0)
    gram = _gram(seed, 14)
    size = 14 // groups
    shape = LayerShape(layer=0, num_experts=14, top_k=1, width=4, groups=groups)
    prices = []
    for mask in masked_sets(gram, shape, (), 8):
        price = gram[np.ix_(mask, mask)].sum()
        prices.append(price)
        for back, away in itertools.product(np.flatnonzero(mask), np.flatnonzero(~mask)):
            if back // size == away // size:
                other = mask.copy()
                other[back], other[away] = False, True
                assert gram[np.ix_(other, other)].sum() >= price - 1e-9
    assert len(prices) == 8 // groups + 1


def test_marginal_errors_are_differences_of_set_errors() -> None:
    gram, masked = _gram(3, 9), np.isin(np.arange(9), [1, 4, 6])
    whole = importance.set_error(gram, np.flatnonzero(~masked).tolist())
    for expert, value in enumerate(marginal_errors(gram, masked)):
        changed = masked.copy()
        changed[expert] = not changed[expert]
        other = importance.set_error(gram, np.flatnonzero(~changed).tolist())
        assert value == pytest.approx(whole - other if masked[expert] else other - whole)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenwise, Any, Any]:
    """What a tiny model did token by token, a run that pools domains, and one that keeps them apart."""
    model, folder = build("olmoe"), tmp_path_factory.mktemp("olmoe")
    pooled, split = watched(model, folder / "pooled"), watched(model, folder / "split", vectors_per_domain=True)
    return observe(model), pooled, split


def _masked_error(layer: Any, kept: list[int], where: NDArray[np.bool_]) -> float:
    """Squared error of the output without the others, over its squared norm, from per-token outputs."""
    dense = layer.dense(layer.gate[..., None] * layer.output, where)
    gone = [one for one in range(layer.size) if one not in kept]
    return float((dense[:, gone].sum(1) ** 2).sum() / (dense.sum(1) ** 2).sum())


def test_estimated_layer_error_is_that_of_the_tokens(seen: tuple[Tokenwise, Any, Any]) -> None:
    tokens, pooled, split = seen
    for run, domains in ((pooled, None), (split, None), (split, ["german"])):
        plan = planner.make(run, preset="set_search", share=0.5, domains=domains)
        after = experts_after(plan)
        where = tokens.where(domains[0] if domains else None)
        errors = [
            _masked_error(layer, [one.lead for one in after[layer.layer.layer, 0]], where) for layer in tokens.layers
        ]
        assert plan.estimate.layer_error == pytest.approx(np.mean(errors), rel=1e-4)


def test_domains_are_searched_together(seen: tuple[Tokenwise, Any, Any]) -> None:
    """With domains kept apart, the found set has the least mean over domains of relative errors, of all sets."""
    tokens, _, split = seen
    plan = planner.make(split, preset="set_search", share=0.5)
    for layer in tokens.layers:
        kept = [one.lead for one in experts_after(plan)[layer.layer.layer, 0]]
        errors = {
            chosen: np.mean([_masked_error(layer, list(chosen), tokens.where(one)) for one in ("code", "german")])
            for chosen in itertools.combinations(range(layer.size), 4)
        }
        assert errors[tuple(kept)] == pytest.approx(min(errors.values()), rel=1e-4)


def test_pooled_grams_are_exact_in_the_diagonal(seen: tuple[Tokenwise, Any, Any]) -> None:
    _, pooled, split = seen
    (own, exact), (guessed, known) = domain_grams(task(split)), domain_grams(task(pooled))
    assert exact and not known
    for one, other in zip(own, guessed, strict=True):
        for key, gram in one.items():
            assert_allclose(np.diag(other[key]), np.diag(gram), rtol=1e-5, atol=1e-9)
            assert np.linalg.eigvalsh(other[key]).min() > -1e-6 * np.trace(gram)
    for key, gram in mixed_gram(task(pooled), "tokens")[0].items():
        assert gram.sum() == pytest.approx(1.0) and len(gram) == 8, key
    notes = [planner.make(one, preset="set_search", share=0.5).evidence[0].notes for one in (pooled, split)]
    assert [any("estimated from its exact diagonal" in note for note in part) for part in notes] == [True, False]


def _gone(plan: Plan) -> list[int]:
    (step,) = plan.steps
    assert isinstance(step, DropStep)
    return [len(layer.experts) for layer in step.layers]


BUDGETED: dict[str, Any] = {"allocation": "budgeted", "engine": "transformers", "mix": "tokens"}


def test_budgeted_removes_as_many_at_less_error() -> None:
    with sample() as run:
        uniform = planner.make(run, preset="set_search", share=0.25, mix="tokens")
        budgeted = planner.make(run, preset="set_search", share=0.25, weigh="equal", **BUDGETED)
    assert sum(_gone(budgeted)) == sum(_gone(uniform)) == 24
    assert max(_gone(budgeted)) <= 14  # two are used by every token
    assert budgeted.steps[0].form == "per_layer"
    assert budgeted.estimate.layer_error < uniform.estimate.layer_error  # type: ignore[operator]
    assert "Layers count alike: each by its share of its own score." in budgeted.evidence[0].notes


def test_layers_compete_by_their_influence(seen: tuple[Tokenwise, Any, Any]) -> None:
    """Of all ways to spread 8 of 32 experts over four layers, the one with the least weighed error."""
    tokens, pooled, _ = seen
    plan = planner.make(pooled, preset="set_search", share=0.25, **BUDGETED)
    costs = []
    for layer in tokens.layers:
        turned = [
            1 - cosine(layer.residual[where], (layer.residual + layer.total)[where]).mean()
            for where in (tokens.where("code"), tokens.where("german"))
        ]
        errors = [
            min(
                _masked_error(layer, sorted(set(range(8)) - set(gone)), tokens.where())
                for gone in itertools.combinations(range(8), count)
            )
            for count in range(7)
        ]
        costs.append(np.mean(turned) * np.array(errors))
    best = min(
        (counts for counts in itertools.product(range(7), repeat=4) if sum(counts) == 8),
        key=lambda counts: sum(cost[count] for cost, count in zip(costs, counts, strict=True)),
    )
    assert tuple(8 - len(experts) for experts in experts_after(plan).values()) == best
    assert any(note.startswith("Layers count by how far their experts turn") for note in plan.evidence[0].notes)


def test_layers_count_alike_where_their_influence_is_not_known(tmp_path: Path) -> None:
    with store.open_run(synthetic.finished(tmp_path, metrics=False)) as run:
        plan = planner.make(run, preset="frequency", share=0.25, **BUDGETED)
        assert "Layers count alike: the run does not know how far" in " ".join(plan.evidence[0].notes)
        equal = planner.make(run, preset="frequency", share=0.25, weigh="equal", **BUDGETED)
        assert equal.steps == plan.steps
        with pytest.raises(PlanError, match="weigh 'size' is not known: use influence or equal"):
            planner.make(run, preset="frequency", share=0.25, weigh="size", **BUDGETED)


def test_loud_domains_do_not_count_more() -> None:
    """Outputs of one domain ten times as large change nothing."""
    with sample() as run:
        whole = task(run)
        grams, _ = domain_grams(whole)
        loud = [
            {key: gram * (100.0 if one == 0 else 1.0) for key, gram in part.items()} for one, part in enumerate(grams)
        ]
        whole.kept["grams"] = (loud, False)
        united, _ = mixed_gram(whole, "union")
        again = task(run)
        plain, _ = mixed_gram(again, "union")
        for key, gram in united.items():
            assert_allclose(gram, plain[key], rtol=1e-9, atol=1e-12)
