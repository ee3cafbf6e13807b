"""What exporters for engines that serve have share: the step, the checkpoint in its own numbers, what is left out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from compressor.exporters.exported import BY_ITSELF
from compressor.plan import (
    CacheStep,
    DropStep,
    LayerKey,
    MergeStep,
    PlaceStep,
    Plan,
    ServingStep,
    experts_after,
    kept_layers,
)
from compressor.plan.result import places_after
from moescope.errors import PlanError


@dataclass(frozen=True)
class Served:
    """The checkpoint that an engine serves: the source when all cuts of the plan are made, in the numbers it has then.

    Attributes:
        num_layers: decoder layers, dense ones included.
        num_experts: E of every MoE layer, those that only fill up included.
        layers: (layer, step) of the source -> decoder layer, in order; MoE layers alone.
        experts: (layer, step) of the source -> expert of the source -> its number.
    """

    num_layers: int
    num_experts: int
    layers: dict[LayerKey, int]
    experts: dict[LayerKey, dict[int, int]]

    @property
    def filled_up(self) -> bool:
        """Some layers have experts that only fill up."""
        return any(len(numbers) < self.num_experts for numbers in self.experts.values())


def served(plan: Plan, engine: str) -> Served:
    """The checkpoint after the plan.

    Raises:
        PlanError: the engine could not load it, or the experts of a layer are called several times.
    """
    after, kept = experts_after(plan), kept_layers(plan)
    if not after:
        raise PlanError(f"the plan leaves no MoE layer, so there is nothing to tell {engine}")
    if any(step for _, step in after):
        raise PlanError(
            f"{plan.source.model} calls the experts of a layer several times, and {engine} knows one call of each"
        )
    forms = {step.form for step in plan.steps if isinstance(step, (DropStep, MergeStep)) and step.layers}
    counts = {len(experts) for experts in after.values()}
    if "shared" in forms:
        raise PlanError(f"experts merged in form shared are loaded by compressor.load alone, not by {engine}")
    if len(counts) > 1 and "padded" not in forms:
        raise PlanError(
            f"layers hold {min(counts)} to {max(counts)} experts, and {engine} has one number for all: cut with form"
            " uniform"
        )
    numbers = {layer: number for number, layer in enumerate(kept)}
    layers = {key: numbers[key[0]] for key in after}
    return Served(len(kept), max(counts), layers, places_after(plan, after))


def cache_step(plan: Plan) -> tuple[CacheStep, str]:
    """The step that says where experts lie, and its place in words.

    Raises:
        PlanError: the plan has none.
    """
    for place, step in enumerate(plan.steps, start=1):
        if isinstance(step, CacheStep):
            return step, f"step {place}, cache"
    raise PlanError("the plan has no cache step, so it does not say where experts lie: plan for a machine first")


def place_step(plan: Plan) -> tuple[PlaceStep, str]:
    """The step that gives experts to devices, and its place in words.

    Raises:
        PlanError: the plan has none.
    """
    for place, step in enumerate(plan.steps, start=1):
        if isinstance(step, PlaceStep):
            return step, f"step {place}, place"
    raise PlanError("the plan has no place step, so no device holds any expert: plan for several devices first")


def placement(plan: Plan, engine: str) -> tuple[PlaceStep, str, Served, dict[int, list[int]]]:
    """The place step, its place in words, the checkpoint, and decoder layer -> expert in each of its slots.

    Raises:
        PlanError: no such step, or a checkpoint that the engine could not load that way.
    """
    step, where = place_step(plan)
    known = served(plan, engine)
    if known.filled_up:
        raise PlanError(
            f"experts that only fill up (form padded) have no slot in the plan, and {engine} wants one for every expert"
        )
    entries = {(layer.layer, layer.step): layer.experts for layer in step.layers}
    slots = {known.layers[key]: [known.experts[key][expert] for expert in entries[key]] for key in known.layers}
    return step, where, known, slots


def unsaid_others(plan: Plan, own: type[CacheStep] | type[PlaceStep]) -> list[str]:
    """Steps that this file is not about: those to be applied first, and those to be exported by themselves."""
    return [
        f"step {place}, {step.step}: "
        + (BY_ITSELF if isinstance(step, ServingStep) else "apply it first; the file speaks of the result's numbers")
        for place, step in enumerate(plan.steps, start=1)
        if not isinstance(step, own)
    ]


def unsaid_place(step: PlaceStep, where: str) -> list[str]:
    """What no map of experts says: which devices stand in a node."""
    return [f"{where}: {step.nodes} nodes; the launcher puts ranks on nodes"] if step.nodes > 1 else []


def unsaid_cache(
    step: CacheStep,
    where: str,
    engine: str,
    *,
    policies: Collection[str],
    misses: Collection[str],
    scopes: Collection[str] = ("layer",),
    disk: str = "",
) -> list[str]:
    """What an engine does not do of a cache step, beside slots and pins.

    Args:
        step: the cache step.
        where: its place in words.
        engine: its name.
        policies: those that the engine has.
        misses: what the engine does with them: load, cpu, or both.
        scopes: layer, shared, or both.
        disk: why experts on disk are not said; empty = the engine has no tier below host memory.
    """
    result = []
    if step.policy not in policies:
        result.append(f"{where}: policy {step.policy}; {engine} knows {' and '.join(policies)} alone")
    if step.misses not in misses:
        result.append(f"{where}: {_MISSES[step.misses]}; in {engine} they {_DONE[next(iter(misses))]}")
    if step.scope not in scopes:
        one, other = _SCOPES if step.scope == "shared" else _SCOPES[::-1]
        result.append(f"{where}: {one}; {engine} has {other}")
    if step.prefetch != "none":
        layers = f"{step.ahead} MoE layer{'s' if step.ahead > 1 else ''} ahead"
        result.append(f"{where}: prefetch by {step.prefetch}, {layers}; {engine} knows none")
    if step.low_bits is not None and step.thresholds is not None:
        first, second = step.thresholds
        result.append(
            f"{where}: a {step.low_bits} bit version for misses of gate weight {first:g} to {second:g}; {engine} knows"
            " one version of each expert"
        )
    reason = disk or f"{engine} knows no tier below host memory"
    for layer in step.layers:
        if layer.disk:
            result.append(f"layer {layer.layer} (experts {_list(layer.disk)} on disk): {reason}")
    return result


def unsaid_slots(step: CacheStep, where: str, reason: str) -> list[str]:
    """A sentence per layer about its slots and pins, for engines that are not told of them."""
    result = [f"{where}: {step.slots} slots for all layers: {reason}"] if step.scope == "shared" else []
    for layer in step.layers:
        pins = f", {_list(layer.pinned)} pinned" if layer.pinned else ""
        if layer.slots:
            result.append(f"layer {layer.layer} (slots for {layer.slots} experts{pins}): {reason}")
    return result


_SCOPES = ("one cache for all layers", "a cache for each layer")
_MISSES = {"load": "missing experts are loaded over the link", "cpu": "missing experts run on the CPU"}
_DONE = {"load": "are loaded", "cpu": "run on the CPU"}


def named(experts: Collection[int]) -> str:
    """Experts by their numbers, as ``expert 3`` or ``experts 3, 7``."""
    return f"expert{'' if len(experts) == 1 else 's'} {', '.join(map(str, experts))}"


def _list(experts: Collection[int]) -> str:
    return ", ".join(map(str, experts))
