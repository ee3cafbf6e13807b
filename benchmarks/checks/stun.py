"""STUN's claim: experts first, then Wanda, does less harm than Wanda alone with as many weights left.

Wanda's masks are made in memory, of the experts' weights alone: per output row the smallest |W_ij| x (norm of input j)
become zero. STUN takes these norms after its first stage. Here both are measured: those, and the norms of the whole
model's run, an approximation but all that a plan could rest on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import planner
import planner.importance as importance
import store
from benchmarks.checks.bench import Bench, bench, cost, interval
from benchmarks.compression import paired
from compressor.edits.layer import LayerEdit
from compressor.memory import edited
from compressor.plan import LayerKey, Plan
from compressor.sites import find_decoder
from profiler.capture.discovery import MoELayer, find_moe_layers
from profiler.evaluation.distribution import Divergence

SHARE, SPARSITIES, CONTROLS = 0.25, (0.4, 0.65, 0.8), 8

Norms = dict[tuple[LayerKey, int], tuple[Tensor, Tensor]]
"""((layer, step), expert) -> norms (H,) of what enters gate and up, and (I,) of what enters down."""

Left = dict[LayerKey, tuple[int, int]]
"""(layer, step) -> weights that are not zero: of gate and up, and of down."""


def check() -> None:
    """Print the table."""
    with bench() as ours:
        path = ours.run("whole")
        with store.open_run(path) as run:
            plans = first_stages(run)
            controls = [planner.make(run, preset="random", share=SHARE, seed=seed) for seed in range(CONTROLS)]
            print(f"{run.info.tokens:,} tokens of calibration text; {SHARE:.0%} fewer experts, nothing else:")
        base, whole = ours.base(), norms_of(path)
        variants = {}
        for name, plan in plans.items():
            print(f"  {name}: KL {interval(cost(ours.model, base, plan))}")
            variants[f"{name} + Wanda, norms of the whole model"] = (plan, _renumbered(whole, ours.model, plan))
            variants[f"{name} + Wanda, norms measured after it"] = (plan, _measured_after(ours, name, plan))
        chance = [cost(ours.model, base, plan).kl for plan in controls]
        print(f"  {CONTROLS} random drops: KL {np.mean(chance):.4f} on average, {min(chance):.4f} to {max(chance):.4f}")
        for sparsity in SPARSITIES:
            left = left_of(ours.model, sparsity)
            alone, count = _measured(ours, base.against, None, whole, left)
            print(f"\n{sparsity:.0%} sparse: {count:,} weights of experts are not zero")
            print(f"  Wanda alone: KL {interval(alone)}")
            for name, (plan, norms) in variants.items():
                found, count = _measured(ours, base.against, plan, norms, left)
                print(f"  {name} ({count:,}): KL {interval(found)}")
                print(f"    less Wanda alone: {paired(found.sequences, alone.sequences)}")


def first_stages(run: store.Run) -> dict[str, Plan]:
    """Name -> the plan before Wanda."""
    return {
        "stun": planner.make(run, preset="stun", share=SHARE),
        "stun, router rows alone": planner.make(run, preset="stun", share=SHARE, coactivation_weight=0.0),
        "even_search": planner.make(run, preset="even_search", share=SHARE),
    }


def wanda_mask(weight: Tensor, norms: Tensor, kept: Tensor) -> Tensor:
    """(rows, columns) bool: of each row the ``kept`` weights with the largest |W_ij| x norm_j.

    Args:
        weight: (rows, columns).
        norms: (columns,)
        kept: (rows,) weights that stay.
    """
    scores = weight.abs() * norms
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < kept[:, None]


def norms_of(path: Path) -> Norms:
    """Wanda's norms of every routed expert that saw a token."""
    with store.open_run(path) as run:
        parts = []
        for score, place in (("wanda_input", "channel"), ("wanda_down", "neuron")):
            frame = importance.score(run, score).filter(kind="routed").sort("layer", "step", "expert", place)
            groups = frame.group_by("layer", "step", "expert", maintain_order=True)
            parts.append({names: torch.from_numpy(rows["value"].to_numpy().copy()) for names, rows in groups})
    return {
        ((layer, step), expert): (values.float(), parts[1][layer, step, expert].float())
        for (layer, step, expert), values in parts[0].items()
    }


def left_of(model: nn.Module, sparsity: float) -> Left:
    """The weights that are left of the whole model at that sparsity."""
    left = {}
    for layer in find_moe_layers(model):
        first, second = _parameters(layer)
        left[layer.key] = round((1 - sparsity) * first.numel()), round((1 - sparsity) * second.numel())
    return left


@contextmanager
def pruned(model: nn.Module, norms: Norms, left: Left) -> Iterator[int]:
    """While entered, so many weights of the experts are left; gives their number. An expert without norms: by size."""
    layers = find_moe_layers(model)
    tensors = [tensor for layer in layers for tensor in _parameters(layer)]
    before = [tensor.clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for layer in layers:
                _prune(layer, norms, *left[layer.key])
        yield sum(int(tensor.count_nonzero()) for tensor in tensors)
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)


def _prune(layer: MoELayer, norms: Norms, first: int, second: int) -> None:
    layout = layer.layout
    assert layout is not None
    experts, count = layer.experts, layout.num_weighted
    ones = torch.ones(layout.hidden_size), torch.ones(layout.width)
    up = [layout.up_weight(experts, expert) for expert in range(count)]
    down = [layout.down_weight(experts, expert) for expert in range(count)]
    for place, (weights, total) in enumerate(((up, first), (down, second))):
        rows = _spread(total, count * len(weights[0])).split(len(weights[0]))
        for expert, (weight, kept) in enumerate(zip(weights, rows, strict=True)):
            weight *= wanda_mask(weight, norms.get((layer.key, expert), ones)[place], kept)


def _spread(total: int, rows: int) -> Tensor:
    """(rows,) whole numbers that differ by at most 1 and sum to the total."""
    return torch.from_numpy(np.diff(np.arange(rows + 1) * total // rows))


def _parameters(layer: MoELayer) -> tuple[Tensor, Tensor]:
    assert layer.layout is not None
    names = layer.layout.up_name, layer.layout.down_name
    first, second = (attrgetter(name)(layer.experts) for name in names)
    return first, second


def _renumbered(norms: Norms, model: nn.Module, plan: Plan) -> Norms:
    """The norms by the numbers that experts have afterwards; none of them may be computed anew."""
    found: Norms = {}
    for key, site in find_decoder(model, plan.source).sites.items():
        edit = LayerEdit.of(plan, key)
        edit.decide(site.read)
        for index in range(edit.count):
            source = edit.untouched(index)
            assert source is not None
            if (key, source) in norms:
                found[key, index] = norms[key, source]
    return found


def _measured_after(ours: Bench, name: str, plan: Plan) -> Norms:
    with edited(ours.model, plan):
        return norms_of(ours.run(name.replace(", ", "-").replace(" ", "-")))


def _measured(
    ours: Bench, against: Callable[[nn.Module], Divergence], plan: Plan | None, norms: Norms, left: Left
) -> tuple[Divergence, int]:
    """The damage of the plan and then Wanda, and the number of weights that are left."""
    if plan is None:
        with pruned(ours.model, norms, left) as count:
            return against(ours.model), count
    with edited(ours.model, plan):
        return _measured(ours, against, None, norms, left)
