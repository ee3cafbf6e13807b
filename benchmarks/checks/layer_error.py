"""The layer error that set search predicts against the one that masking the experts has, token by token."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import planner
import planner.importance as importance
import store
from benchmarks.checks.bench import Bench, bench
from compressor.plan import LayerKey, Plan, experts_after
from profiler.capture.discovery import find_moe_layers
from profiler.running import evaluating

BAR = 1e-4
SHARES, PRESETS = (0.25, 0.5), ("set_search", "even_search", "random")

Errors = dict[tuple[str, LayerKey, str], NDArray[np.float64]]
"""(plan, (layer, step), domain) -> squared error and squared norm of the layer's output, summed over tokens."""


def check() -> None:
    """Print the largest difference of each plan."""
    with bench() as ours:
        path = ours.run("sample", vectors_per_domain=True)
        with store.open_run(path) as run:
            plans = {
                f"{preset} {share:.0%}": planner.make(run, preset=preset, share=share)
                for preset in PRESETS
                for share in SHARES
            }
            grams = {domain: importance.output_gram(run, domain=domain) for domain in run.domains}
            tokens = run.info.tokens
        found = masked_errors(ours, plans)
        print(f"{tokens:,} tokens of the run's own text, {len(grams)} domains; bar {BAR:g}")
        for name, plan in plans.items():
            _report(name, plan, grams, {key[1:]: sums for key, sums in found.items() if key[0] == name})


def masked_errors(ours: Bench, plans: dict[str, Plan]) -> Errors:
    """What the experts put out as they are, less what they put out with gate weights of zero for those that go.

    Each layer sees what it sees in the whole model, and nothing is routed anew.
    """
    found: Errors = defaultdict(lambda: np.zeros(2))
    kept = {name: experts_after(plan) for name, plan in plans.items()}
    where: list[Any] = [None]

    def after(key: LayerKey, experts: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        hidden, ids, weights = args
        for name, layers in kept.items():
            stays = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
            numbers = torch.tensor([expert.lead for expert in layers[key]])
            stays[numbers[numbers < len(stays)]] = True
            masked = experts.forward(hidden, ids, torch.where(stays[ids], weights, 0.0))
            error = (output.double() - masked.double()).square().sum(1)
            sums = torch.stack([error, output.double().square().sum(1)], 1)
            for domain, rows in where[0].items():
                found[name, key, domain] += sums[rows].sum(0).numpy()

    layers = find_moe_layers(ours.model)
    hooks = [layer.experts.register_forward_hook(partial(after, layer.key)) for layer in layers]
    try:
        with evaluating(ours.model), torch.no_grad():
            for batch in ours.calibration.batches():
                domains = np.repeat(np.array(batch.domains), batch.input_ids.shape[1])
                real = batch.attention_mask.astype(bool).ravel()
                where[0] = {domain: torch.from_numpy((domains == domain) & real) for domain in set(batch.domains)}
                ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
                ours.model(input_ids=ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)


def _report(name: str, plan: Plan, grams: dict[str, Any], found: dict[tuple[LayerKey, str], Any]) -> None:
    """The largest relative difference over layers and domains, and that of the plan's own estimate."""
    largest, means = 0.0, []
    for key, experts in experts_after(plan).items():
        kept = [expert.lead for expert in experts]
        for domain, parts in grams.items():
            error, norm = found[key, domain]
            predicted = importance.set_error(parts[key], kept) / parts[key].sum()
            largest = max(largest, abs(predicted / (error / norm) - 1))
        error, norm = np.sum([found[key, domain] for domain in grams], axis=0)
        means.append(error / norm)
    measured = float(np.mean(means))
    assert plan.estimate.layer_error is not None
    whole = abs(plan.estimate.layer_error / measured - 1)
    verdict = "within the bar" if max(largest, whole) <= BAR else "ABOVE THE BAR"
    print(
        f"  {name:16s} estimated {plan.estimate.layer_error:.6f}, measured {measured:.6f}, apart by {whole:.1e};"
        f" any layer and domain by at most {largest:.1e}: {verdict}"
    )
