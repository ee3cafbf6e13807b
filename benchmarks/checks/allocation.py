"""What the default plan's gain comes from: how many experts each layer loses, or which."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

import planner
import store
from benchmarks.checks.bench import bench, cost, interval
from compressor.plan import DropLayer, DropStep, Plan

SHARES = (0.25, 0.5)
SCORES = ("frequency", "gate_mass", "ean", "man", "msan", "tcess", "easy_ep", "set_search", "even_search")
DRAWS = 8


def check() -> None:
    """Print the damage of the default, of other scores spread alike, and of random experts in the same numbers."""
    with bench() as ours:
        path = ours.run("sample")
        base = ours.base()
        with store.open_run(path) as run:
            for share in SHARES:
                print(f"{share:.0%} fewer experts, KL")
                default = planner.make(run, share=share)
                print(f"  {planner.DEFAULT:30s} {interval(cost(ours.model, base, default))}")
                spread: dict[str, Any] = {"allocation": "budgeted", "share": share}
                for name in SCORES:
                    found = cost(ours.model, base, planner.make(run, preset=name, **spread))
                    print(f"  {name + ', spread alike':30s} {interval(found)}")
                equal = cost(ours.model, base, planner.make(run, preset="reap", weigh="equal", **spread))
                print(f"  {'reap, layers count alike':30s} {interval(equal)}")
                print(f"  {'reap, the same everywhere':30s} ", end="")
                print(interval(cost(ours.model, base, planner.make(run, preset="reap", share=share))))
                kls = [cost(ours.model, base, plan).kl for plan in _others(default)]
                print(f"  the default's numbers, random experts: {np.mean(kls):.4f} ({min(kls):.4f} to {max(kls):.4f})")


def _others(plan: Plan) -> Iterator[Plan]:
    """Plans that take as many experts from each layer, drawn at random."""
    (step,) = plan.steps
    assert isinstance(step, DropStep)
    sizes = {shape.layer: shape.num_experts for shape in plan.source.layers}
    for seed in range(DRAWS):
        draw = random.Random(seed)
        layers = [
            DropLayer(
                layer=layer.layer, experts=tuple(sorted(draw.sample(range(sizes[layer.layer]), len(layer.experts))))
            )
            for layer in step.layers
        ]
        yield plan.model_copy(update={"steps": (step.model_copy(update={"layers": tuple(layers)}),), "evidence": ()})
