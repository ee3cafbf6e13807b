"""Variants on unequal devices against trying everything."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place.heterogeneous import Choices, assign, described, feasible


def _choices(domains: int, variants: int, devices: int, seed: int, tight: float = 1.0) -> Choices:
    rng = np.random.default_rng(seed)
    size = np.sort(rng.uniform(1, 10, variants))  # larger variants are better, slower, hungrier
    speed = rng.uniform(0.5, 2, devices)
    return Choices(
        loss=3 - 0.2 * size[:, None] + rng.uniform(0, 0.6, (variants, domains)),
        latency=size[:, None] / speed[None], energy=size[:, None] * speed[None],
        memory=size, share=rng.dirichlet(np.ones(domains)),
        latency_limit=rng.uniform(3, 14, domains), energy_limit=rng.uniform(1, 5, devices) * tight,
        memory_limit=rng.uniform(8, 16, devices) * tight,
    )  # fmt: skip


def _brute(choices: Choices) -> float | None:
    """The least loss of all assignments, each checked by itself."""
    variants, domains = choices.loss.shape
    devices = choices.latency.shape[1]
    places = list(itertools.product(range(variants), range(devices)))
    best = None
    for chosen in itertools.product(places, repeat=domains):
        used, there = np.zeros(devices), np.zeros(devices)
        for domain, (model, machine) in enumerate(chosen):
            used[machine] += choices.share[domain] * choices.energy[model, machine]
        for model, machine in set(chosen):
            there[machine] += choices.memory[model]
        slow = any(choices.latency[place] > choices.latency_limit[at] for at, place in enumerate(chosen))
        if slow or (used > choices.energy_limit).any() or (there > choices.memory_limit).any():
            continue
        loss = sum(choices.share[at] * choices.loss[model, at] for at, (model, _) in enumerate(chosen))
        best = loss if best is None else min(best, loss)
    return best


SHAPES = [(1, 3, 4), (2, 3, 2), (3, 2, 3), (4, 3, 2), (5, 2, 2), (6, 2, 2), (12, 2, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_as_good_as_the_best_of_all_assignments(shape: tuple[int, int, int], seed: int) -> None:
    choices = _choices(*shape, seed)
    best = _brute(choices)
    if best is None:
        with pytest.raises(PlanError):
            assign(choices)
        return
    found = assign(choices)
    assert found.loss == pytest.approx(best, rel=1e-9) and feasible(choices, found)


def test_some_of_these_can_be_met_and_some_cannot() -> None:
    outcomes = {_brute(_choices(*shape, seed)) is None for shape in SHAPES for seed in range(4)}
    assert outcomes == {True, False}


def test_a_variant_that_serves_two_domains_takes_memory_once() -> None:
    choices = Choices(
        loss=np.array([[1.0, 1.0]]), latency=np.ones((1, 1)), energy=np.array([[4.0]]), memory=np.array([10.0]),
        share=np.array([0.25, 0.75]), latency_limit=np.ones(2), energy_limit=np.array([4.0]),
        memory_limit=np.array([10.0]),
    )  # fmt: skip
    found = assign(choices)
    assert found.memory.tolist() == [10.0] and found.energy.tolist() == [4.0]
    assert found == described(choices, (0, 0), (0, 0)) or found.variant == (0, 0)


def test_bytes_that_would_do_are_not_rounded_down() -> None:
    choices = Choices(
        loss=np.array([[1.0]]), latency=np.ones((1, 1)), energy=np.zeros((1, 1)), memory=np.array([41_000_000_123.0]),
        share=np.ones(1), latency_limit=np.full(1, 2.0), energy_limit=np.full(1, 9.0), memory_limit=np.full(1, 16e9),
        domains=("code",), devices=("phone",),
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"16,000,000,000 bytes of memory, and with 41,000,000,123 there"):
        assign(choices)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latency_limit": np.array([2.0, 0.5])}, r"domain 'law' wants 0.5 seconds and the fastest variant takes 1"),
        ({"memory_limit": np.array([3.0, 3.0])}, r"device 'phone' has 3 bytes of memory, and with 5 there would be"),
        ({"energy_limit": np.array([1.0, 1.0])}, r"the energy of several devices is too small|joules of energy"),
        ({"memory_limit": np.zeros(2), "energy_limit": np.zeros(2)}, r"memory and energy stand in the way together"),
    ],
)
def test_the_limit_that_binds_is_named(changes: dict[str, np.ndarray], message: str) -> None:
    choices = Choices(
        loss=np.array([[1.0, 1.0]]), latency=np.ones((1, 2)), energy=np.full((1, 2), 4.0), memory=np.array([5.0]),
        share=np.ones(2), latency_limit=np.full(2, 2.0), energy_limit=np.full(2, 9.0), memory_limit=np.full(2, 9.0),
        domains=("code", "law"), devices=("phone", "box"),
    )  # fmt: skip
    assert feasible(choices, assign(choices))
    with pytest.raises(PlanError, match=message):
        assign(replace(choices, **changes))  # type: ignore[arg-type]


def test_more_than_can_be_tried_is_solved_too() -> None:
    choices = _choices(30, 4, 5, 1, tight=3.0)
    found = assign(choices)
    assert feasible(choices, found)
    unlimited = float(np.dot(choices.share, choices.loss.min(axis=0)))
    assert unlimited <= found.loss


def test_figures_that_cannot_be() -> None:
    choices = _choices(2, 2, 2, 0)
    with pytest.raises(PlanError, match=r"latency has shape \(3, 2\); it is \(2, 2\)"):
        replace(choices, latency=np.ones((3, 2)))
    with pytest.raises(PlanError, match="energy holds -1: give numbers of 0 or more"):
        replace(choices, energy=np.full((2, 2), -1.0))
