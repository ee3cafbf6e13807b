"""What the guard of super experts costs and saves: on the bundled model, and on one into which they were planted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import planner
import profiler
import store
from benchmarks.checks.bench import bench, cost, interval
from benchmarks.compression import paired
from compressor.plan import DropLayer, DropStep, Plan
from planner.guard import Rule, guard_of
from profiler.evaluation.distribution import BaseDistribution, Divergence

SHARES = (0.25, 0.5)
RULES: tuple[Rule, ...] = ("paper", "code")
TEXTS, ROWS, LENGTH = 6, 8, 96
"""Batches of counting text for the planted model, half of them for calibration; sequences in each; their tokens."""


def check() -> None:
    """Print both parts."""
    with bench() as ours, store.open_run(ours.run("sample")) as run:
        print(f"The bundled model: {run.info.tokens:,} tokens of calibration text")
        base = ours.base()
        _with_and_without(ours.model, base, run, ("reap", "even_search", "frequency"))
        for unit in guard_of(run, "code").protected:
            _alone(ours.model, base, planner.make(run, preset="random", share=0.5), unit.layer, unit.expert)
    _planted()


def _with_and_without(model: Any, base: BaseDistribution, run: store.Run, presets: tuple[str, ...]) -> None:
    """Damage of each preset's plans under each rule, and what the unguarded plan drops of what the rule protects."""
    for rule in RULES:
        units = [(unit.layer, unit.expert) for unit in guard_of(run, rule).protected]
        print(f"  by the {rule}'s rule: {units or 'nobody'}")
    for share in SHARES:
        for preset in presets:
            free = planner.make(run, preset=preset, share=share, guard=False)
            damage = cost(model, base, free)
            print(f"  {share:.0%} {preset:12s} no guard: {_damage(damage)}")
            plans = {rule: planner.make(run, preset=preset, share=share, guard=rule) for rule in RULES}
            same = [rule for rule, plan in plans.items() if plan.steps == free.steps]
            if same:
                print(f"    {' and '.join(same)}: the same plan")
            for steps in dict.fromkeys(plan.steps for plan in plans.values() if plan.steps != free.steps):
                rules = [rule for rule, plan in plans.items() if plan.steps == steps]
                _compare(model, base, free, plans[rules[0]], damage, " and ".join(rules))


def _compare(model: Any, base: BaseDistribution, free: Plan, guarded: Plan, damage: Divergence, rules: str) -> None:
    units = {(unit.layer, unit.expert) for unit in guarded.evidence[0].protected}
    found = cost(model, base, guarded)
    print(f"    {rules}: {_damage(found)}; kept {sorted(units & _dropped(free))}")
    print(f"      guarded less unguarded: KL {paired(found.sequences, damage.sequences)}")


def _damage(found: Divergence) -> str:
    return f"KL {interval(found)}, perplexity x {found.ratio.value:.4g}"


def _dropped(plan: Plan) -> set[tuple[int, int]]:
    layers = [layer for step in plan.steps if isinstance(step, DropStep) for layer in step.layers]
    return {(layer.layer, expert) for layer in layers for expert in layer.experts}


def _alone(model: Any, base: BaseDistribution, any_plan: Plan, layer: int, protected: int) -> None:
    """Each expert of the layer dropped alone, the protected one among them."""
    count = next(shape.num_experts for shape in any_plan.source.layers if shape.layer == layer)
    found = {}
    for expert in range(count):
        step = DropStep(method="alone", form="per_layer", layers=(DropLayer(layer=layer, experts=(expert,)),))
        found[expert] = cost(model, base, any_plan.model_copy(update={"steps": (step,)}).checked())
    order = sorted(found, key=lambda expert: -found[expert].kl)
    print(f"  one expert of layer {layer} dropped, KL from the dearest:")
    print("    " + ", ".join(f"{expert} {found[expert].kl:.4f}" for expert in order))
    middle = order[count // 2]
    difference = paired(found[protected].sequences, found[middle].sequences)
    print(f"    {protected} is number {order.index(protected) + 1} of {count}; less expert {middle}: {difference}")


def _planted() -> None:
    # It sets the number of threads of this process to one when it is imported.
    from tests.profiler.planted import PLANTED, counting_batches, planted_model

    model = planted_model()
    batches = list(counting_batches(TEXTS, rows=ROWS, length=LENGTH))
    calibration, held_out = batches[: TEXTS // 2], batches[TEXTS // 2 :]
    with tempfile.TemporaryDirectory() as folder:
        with profiler.watch(model, store=Path(folder), name="planted", level="activations") as session, torch.no_grad():
            for batch in calibration:
                session.label(domains=batch.domains)
                ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
                model(input_ids=ids, attention_mask=mask)
        assert session.path is not None
        with store.open_run(session.path) as run:
            print(
                f"\nThe planted model, {[one[:2] for one in PLANTED]}: {run.info.tokens:,} tokens of calibration text"
            )
            base = BaseDistribution.of(model, held_out)
            _with_and_without(model, base, run, ("frequency", "gate_mass", "random", "reap", "even_search"))
