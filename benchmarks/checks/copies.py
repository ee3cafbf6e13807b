"""Experts that were copied: whether the preset finds them and nothing else, and what merging them costs by form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

import planner
import store
from benchmarks.checks.bench import Bench, bench, cost, interval
from compressor.plan import MergeStep, Plan
from moescope.errors import PlanError
from profiler.capture.discovery import find_moe_layers

PAIR, LAYER = (5, 11), 3
"""The first is copied over the second."""


def check() -> None:
    """Print what was found, and the damage by form."""
    with bench() as ours:
        every = [layer.layer for layer in find_moe_layers(ours.model)]
        cases: list[tuple[list[int], Literal["per_layer", "uniform"]]] = [([LAYER], "per_layer"), (every, "uniform")]
        for layers, form in cases:
            for rows in (False, True):
                with copied(ours.model, layers, rows=rows):
                    _report(ours, layers, form, rows)


@contextmanager
def copied(model: nn.Module, layers: Sequence[int], *, rows: bool) -> Iterator[None]:
    """While entered, one expert of these layers has another's weights, and its row of the router if so wished."""
    tensors = []
    for layer in find_moe_layers(model):
        if layer.layer in layers:
            assert layer.router is not None
            tensors += [*layer.experts.parameters(), *(layer.router.parameters() if rows else [])]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor[PAIR[1]] = tensor[PAIR[0]]
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)


def _report(ours: Bench, layers: Sequence[int], form: Literal["per_layer", "uniform"], rows: bool) -> None:
    path = ours.run(f"copied-{len(layers)}-{rows}", "routing,activations,similarity", similarity_every=4)
    with store.open_run(path) as run:
        experts = sum(layer.num_experts for layer in run.layers)
        share = len(layers) / experts
        shared = planner.make(run, preset="copies", share=share, engine="transformers")
        try:
            planner.make(run, preset="copies", share=share + 1 / experts, engine="transformers")
            more = "NOT refused"
        except PlanError:
            more = "refused"
    found = _pairs(shared)
    exact = found == [(layer, PAIR) for layer in layers]
    print(f"\n{len(layers)} of {experts} experts copied, router rows {'copied too' if rows else 'left'}")
    print(f"  merged: {found}: {'exactly the copies' if exact else 'NOT the copies'}; one more: {more}")
    base = ours.base()
    for plan in (shared, _in_form(shared, form)):
        divergence = cost(ours.model, base, plan)
        print(f"  {_step(plan).form:9s} KL {divergence.kl:.2e}, {interval(divergence)}")


def _step(plan: Plan) -> MergeStep:
    (step,) = plan.steps
    assert isinstance(step, MergeStep)
    return step


def _pairs(plan: Plan) -> list[tuple[int, tuple[int, ...]]]:
    groups = [(layer.layer, group.members) for layer in _step(plan).layers for group in layer.groups]
    return [group for group in groups if len(group[1]) > 1]


def _in_form(plan: Plan, form: Literal["per_layer", "uniform"]) -> Plan:
    """The same groups, with routers that lose the rows of those that go."""
    return plan.model_copy(update={"steps": (_step(plan).model_copy(update={"form": form}),)}).checked()
