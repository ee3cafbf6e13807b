"""How far a plan turns the residual stream, layer by layer, from a run's sums alone: what its divergence is made of.

A change d of what the experts add to a token's stream r + y costs about ``|d|^2 / |r + y|^2`` nats, whatever the layer
and whatever was changed: norms come next, so that what counts is the change against the stream that it is added to.
Means over tokens, summed over layers, come within a factor of two of the KL divergence measured on the bundled model,
for dropped experts and for narrower weights alike (benchmarks/README.md). Ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import polars as pl

from compressor.plan import (
    BITS,
    PARTS,
    DropStep,
    ExpertBits,
    FactorStep,
    LayerKey,
    MergeLayer,
    MergeStep,
    NewExpert,
    Plan,
    QuantizeStep,
    SlimStep,
    experts_after,
)
from compressor.plan.result import bits_after, neurons_after
from moescope.errors import PlanError
from planner.importance.statistics import Statistics
from planner.probes import depth_probe
from planner.quantize.errors import LayerErrors, layer_errors
from planner.task import Array, Task, once


@dataclass(frozen=True)
class Turned:
    """What one decoder layer adds: mean over tokens of the squared change, as a part of the squared stream.

    Attributes:
        cut: by experts, blocks or the layer that go, and by the experts that take their tokens.
        merged: by experts that answer in place of others.
        slimmed: by neurons that go.
        bits: by narrower weights.
    """

    cut: float = 0.0
    merged: float = 0.0
    slimmed: float = 0.0
    bits: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.cut + self.merged + self.slimmed + self.bits


KINDS = tuple(field.name for field in fields(Turned))
"""What changes a stream."""


def stream_turns(plan: Plan, task: Task) -> dict[int, Turned] | None:
    """Decoder layer -> how far the plan turns its stream; None where the run cannot price the plan.

    That is where it did not see the residual stream (level activations of a run made before it was summed), and for
    factors and narrow activations, whose errors no run has.
    """
    if any(isinstance(step, FactorStep) or _narrow_activations(step) for step in plan.steps):
        return None
    try:
        return _Pricing(plan, task).layers()
    except PlanError:
        return None


def _narrow_activations(step: object) -> bool:
    return isinstance(step, QuantizeStep) and step.activation_bits is not None


@dataclass(frozen=True)
class Streams:
    """Of one layer: per routed expert, means over the layer's tokens.

    Attributes:
        part: (experts,) squared gated output as a part of the squared stream.
        gate: (experts,) squared gate weight over the squared stream.
        gated: (experts,) squared gated output.
        norm: (experts,) squared output before the gate weight, mean over the expert's own tokens.
    """

    part: Array
    gate: Array
    gated: Array
    norm: Array

    def evened(self, even: float) -> Streams:
        """The same where a part of each figure is spread evenly over the experts: other text uses others."""
        mix = {name: (1 - even) * getattr(self, name) + even * getattr(self, name).mean() for name in ("part", "gate")}
        return replace(self, **mix)

    @property
    def ratio(self) -> Array:
        """(experts,) what a squared change of an expert's gated output costs."""
        whole = self.part.sum() / max(self.gated.sum(), 1e-300)
        found = np.full_like(self.part, whole)
        np.divide(self.part, self.gated, out=found, where=self.gated > 0)
        return found


def streams(task: Task) -> dict[LayerKey, Streams]:
    """(layer, step) -> its experts, over the task's domains; worked out once per task.

    Raises:
        PlanError: the run has no such sums.
    """
    return once(task.kept, "streams", lambda: _streams(task))


def stream_seen(task: Task) -> bool:
    """Whether the run saw what plans are priced by."""
    try:
        return bool(streams(task))
    except PlanError:
        return False


def _streams(task: Task) -> dict[LayerKey, Streams]:
    names = ("tokens", "norm_square_sum", "gated_norm_square_sum", "stream_square_sum", "stream_gate_sum")
    table = task.run.table("expert_output")
    if "stream_square_sum" not in table.columns or table["stream_square_sum"].null_count():
        raise PlanError(f"run {task.run.name!r} has no expert_output.stream_square_sum: collect it again")
    rows = table.filter((pl.col("kind") == "routed") & pl.col("domain").is_in(task.domains))
    summed = rows.group_by("layer", "step", "expert").agg(pl.col(names).sum())
    tokens = _tokens(task)
    by_layer = summed.partition_by("layer", "step", as_dict=True)
    found = {}
    for shape in task.source.layers:
        part = by_layer.get(shape.key, summed.head(0)).filter(pl.col("expert") < shape.num_experts)
        values = np.zeros((len(names), shape.num_experts))
        values[:, part["expert"].to_numpy()] = part.select(names).to_numpy().T
        count = tokens.get(shape.key, 0)
        if not count or not values[3].sum():
            raise PlanError(f"run {task.run.name!r} did not see the stream before layer {shape.layer}")
        found[shape.key] = Streams(
            part=values[3] / count, gate=values[4] / count, gated=values[2] / count,
            norm=values[1] / np.maximum(values[0], 1),
        )  # fmt: skip
    return found


def _tokens(task: Task) -> dict[LayerKey, int]:
    rows = task.run.table("moe_output").filter(pl.col("domain").is_in(task.domains))
    summed = rows.group_by("layer", "step").agg(pl.col("residual_tokens").sum())
    return {(layer, step): count for layer, step, count in summed.iter_rows()}


class _Pricing:
    """What a plan costs each layer."""

    def __init__(self, plan: Plan, task: Task) -> None:
        self.plan, self.task = plan, task
        self.streams, self.after = streams(task), experts_after(plan)
        self.bits, self.masks = bits_after(plan), neurons_after(plan)
        self.silent = {layer for step in plan.steps if isinstance(step, DropStep) for layer in step.blocks}
        merges = [step for step in plan.steps if isinstance(step, MergeStep)]
        self.merges = {(layer.layer, layer.step): (step, layer) for step in merges for layer in step.layers}

    def layers(self) -> dict[int, Turned]:
        """Decoder layer -> what it costs."""
        found = self._whole_layers()
        for key, stream in self.streams.items():
            if key not in self.after:
                continue
            if key[0] in self.silent:
                found[key[0]] = Turned(cut=float(stream.part.sum()))
                continue
            experts = self.after[key]
            found[key[0]] = Turned(
                cut=self._cut(key, stream, experts),
                merged=self._merged(key, stream),
                slimmed=self._slimmed(key, stream, experts),
                bits=self._bits(key, stream, experts),
            )
        return found

    def _whole_layers(self) -> dict[int, Turned]:
        """Layers that go turn the stream by the angle between what enters and leaves them."""
        gone = {layer for step in self.plan.steps if isinstance(step, DropStep) for layer in step.decoder_layers}
        if not gone:
            return {}
        probed = depth_probe(self.task.run).filter(pl.col("domain").is_in(self.task.domains))
        means = dict(probed.group_by("layer").agg(pl.col("influence").mean()).iter_rows())
        return {layer: Turned(cut=2 * float(means[layer])) for layer in sorted(gone)}

    def _cut(self, key: LayerKey, stream: Streams, experts: list[NewExpert]) -> float:
        stays = {member for one in experts for member in one.members}
        gone = [expert for expert in range(len(stream.part)) if expert not in stays]
        return float(gone_cost(stream, gone).sum()) if gone else 0.0

    def _merged(self, key: LayerKey, stream: Streams) -> float:
        """Members answer as their group's mean would; where their rows go, their tokens go where those of the lead do.

        What members' outputs have in common is read from a sample on which all experts ran (level similarity); without
        it, they have nothing in common.
        """
        if key not in self.merges:
            return 0.0
        step, layer = self.merges[key]
        differs, cost = self._differences(key, layer), 0.0
        for group in layer.groups:
            others = [member for member in group.members if member != group.lead]
            if not others:
                continue
            if step.form == "shared":
                cost += float((differs[list(group.members)] * stream.part[list(group.members)]).sum())
                continue
            cost += float(differs[group.lead] * stream.part[group.lead])
            cost += float((np.minimum(differs[others], 1.0) * gone_cost(stream, others)).sum())
        return cost

    def _differences(self, key: LayerKey, layer: MergeLayer) -> Array:
        """(experts,) squared distance of each member's outputs to its group's mean, as a part of their square."""
        products = _products(self.task).get(key)
        differs = np.ones(len(self.streams[key].part))
        for group in layer.groups if products is not None else ():
            members = list(group.members)
            gram = products[np.ix_(members, members)]  # type: ignore[index]
            mean = np.array(group.weights)
            distance = np.diag(gram) - 2 * gram @ mean + mean @ gram @ mean
            differs[members] = np.maximum(distance, 0.0) / np.maximum(np.diag(gram), 1e-300)
        return differs

    def _slimmed(self, key: LayerKey, stream: Streams, experts: list[NewExpert]) -> float:
        if not any(isinstance(step, SlimStep) for step in self.plan.steps):
            return 0.0
        squares, cost = neuron_squares(self.task)[key], 0.0
        for one in experts:
            mask = self.masks.get((*key, one.lead, "routed"))
            if mask is None:
                continue
            square = squares[list(one.members)].sum(0)
            part = float(stream.part[list(one.members)].sum())
            cost += part * float(square[~mask].sum()) / max(float(square.sum()), 1e-300)
        return cost

    def _bits(self, key: LayerKey, stream: Streams, experts: list[NewExpert]) -> float:
        if not self.bits:
            return 0.0
        errors = layer_errors(self.task)[key]
        relative = 1.0 / np.maximum(errors.energy, 1e-300)
        cost = 0.0
        for one in experts:
            entry = self.bits.get((*key, one.lead, "routed"))
            if entry is not None:
                lost = _error(errors, entry, one.lead) * relative[one.lead] if errors.energy[one.lead] > 0 else 0.0
                cost += lost * float(stream.part[list(one.members)].sum())
        shared = self.bits.get((*key, 0, "shared"))
        if shared is not None and len(errors.shared_energy):
            whole = float(stream.part.sum()) / max(float(errors.energy.sum()), 1e-300)
            cost += _error(errors, shared, 0) * whole
        return cost


def gone_cost(stream: Streams, gone: list[int]) -> Array:
    """(gone,) what each loses, and what the experts that take its tokens add: as much as the layer's median expert.

    The median of all, not of those that stay: where few stay, a super expert among them would speak for the rest.
    """
    cost: Array = stream.part[gone] + stream.gate[gone] * float(np.median(stream.norm))
    return cost


def _error(errors: LayerErrors, entry: tuple[ExpertBits, QuantizeStep], place: int) -> float:
    bits, step = entry
    by_part = errors.errors if bits.role == "routed" else errors.shared_errors
    widths = {bits.of(part) for part in PARTS if bits.of(part) is not None}
    if step.nested is not None and len(widths) == 1 and np.isfinite(errors.nested).all():
        width = next(iter(widths))
        if width in (2, 3, 4) and step.nested == 2:
            return float(errors.nested[place, int(width) - 2])
    whole = all(bits.of(part) is not None or not by_part[part].any() for part in PARTS)
    if len(widths) == 1 and whole:
        return float(by_part["all"][place, BITS.index(next(iter(widths)))])
    return float(sum(by_part[part][place, BITS.index(width)] for part in PARTS if (width := bits.of(part)) is not None))


def _products(task: Task) -> Mapping[LayerKey, Array]:
    """(layer, step) -> (experts, experts) products of outputs on a sample that all experts ran on; empty without."""
    if "sample_products" not in task.kept:
        task.kept["sample_products"] = {}
        if not task.run.table("expert_similarity").is_empty():
            statistics = Statistics(task.run, level="similarity")
            task.kept["sample_products"] = dict(statistics.matrices("expert_similarity", "product_sum"))
    found: Mapping[LayerKey, Array] = task.kept["sample_products"]
    return found


def neuron_squares(task: Task) -> Mapping[LayerKey, Array]:
    """(layer, step) -> (experts, neurons) squared gated activation times the squared norm of the down column."""
    if "neuron_squares" not in task.kept:
        from planner.slim.neurons import neuron_scores

        scores, _ = neuron_scores(
            task, "camera", "neuron_activation", scope="model", mix="tokens" if task.every_domain else "union",
            shared=False, parameters={"alpha": 0.0},
        )  # fmt: skip
        task.kept["neuron_squares"] = {key: one.routed for key, one in scores.items()}
    found: Mapping[LayerKey, Array] = task.kept["neuron_squares"]
    return found
