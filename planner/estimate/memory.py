"""What a device's memory holds beside cached experts: other weights, keys and values, activations; and what is left.

::

    rest = dense_part(run.info.model_config, source)
    budget = memory_budget(machine.vram, rest, source, context=8192, batch=1)
    budget.slots(expert_sizes(source, source_bits=16))         # routed experts that fit
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressor.plan import LayerKey, Plan, Source
from moescope.errors import PlanError
from planner.estimate.dense import DensePart
from planner.estimate.storage import stored_parts
from planner.machine import GIB
from profiler.metrics._arrays import FloatArray

VALUE_BYTES = 2
"""Of keys, values and activations: 16 bits."""


@dataclass(frozen=True)
class ExpertSizes:
    """What each routed expert takes.

    Attributes:
        layers: (layer, step) of axis 0.
        bytes: (layers, E); 0 for experts that the plan leaves out.
        parameters: (layers, E) weights.
    """

    layers: tuple[LayerKey, ...]
    bytes: FloatArray
    parameters: NDArray[np.int64]

    @property
    def total(self) -> float:
        """Bytes of all."""
        return float(self.bytes.sum())

    @property
    def largest(self) -> FloatArray:
        """(layers,) bytes of the largest expert of each: what a slot of a cache must hold."""
        found: FloatArray = self.bytes.max(axis=1)
        return found


def expert_sizes(plan: Plan | Source, *, source_bits: float) -> ExpertSizes:
    """Bytes and weights of every routed expert, scales and zero points counted; biases are left out.

    Args:
        plan: what it leaves, expert by expert; a source = all of it as it is.
        source_bits: bits of a weight that stays as it is.
    """
    source = plan if isinstance(plan, Source) else plan.source
    keys = tuple(shape.key for shape in source.layers)
    width = max(shape.num_experts for shape in source.layers)
    bits, weights = np.zeros((len(keys), width)), np.zeros((len(keys), width), np.int64)
    if isinstance(plan, Source):
        per_neuron = (3 if source.gated else 2) * source.expert_size
        for row, shape in enumerate(source.layers):
            weights[row, : shape.num_experts] = shape.width * per_neuron
        return ExpertSizes(keys, weights * source_bits / 8, weights)
    place = {key: row for row, key in enumerate(keys)}
    for part in stored_parts(plan, source_bits=source_bits):
        layer, step, expert, role = part.unit
        if role == "routed" and expert >= 0:
            bits[place[layer, step], expert] += part.weights * part.bits
            weights[place[layer, step], expert] += part.weights
    return ExpertSizes(keys, bits / 8, weights)


def kv_bytes(rest: DensePart, *, context: int, batch: int = 1, value_bytes: float = VALUE_BYTES) -> float:
    """Bytes of keys and values.

    Plain attention keeps 2 x heads x width per layer and token, MLA its latent vector and the rotary key, windows their
    last tokens only. States of linear attention do not grow and are left out.

    Args:
        rest: of the model.
        context: tokens of each sequence.
        batch: sequences.
        value_bytes: of one value.
    """
    return sum(_kept(layer.window, context) * layer.kv_values for layer in rest.layers) * batch * value_bytes


def activation_bytes(
    rest: DensePart, source: Source, *, tokens: int, sequences: int, value_bytes: float = VALUE_BYTES
) -> float:
    """An upper estimate of what one forward pass holds at a time, with fused attention (no matrix of scores).

    Per token: the residual stream and a layer's input; of the layer that needs most, either queries, keys, values and
    the attended values, or gate, up and output of its k experts and of the shared ones beside router scores in 32 bits.
    Per sequence: logits in 32 bits.

    Args:
        rest: of the model.
        source: its experts.
        tokens: of one pass: the batch, or a chunk of a prompt.
        sequences: that give a token each.
        value_bytes: of one activation.
    """
    attention = 2 * rest.attention_width + max(layer.kv_values for layer in rest.layers)
    experts = max(
        value_bytes * (shape.top_k * (2 * shape.width + source.expert_size) + 2 * shape.shared_width)
        + 4 * shape.num_experts
        for shape in source.layers
    )
    per_token = 2 * value_bytes * source.hidden_size + max(value_bytes * attention, experts)
    return tokens * per_token + sequences * rest.vocabulary * 4.0


@dataclass(frozen=True)
class MemoryBudget:
    """What a device's memory goes to.

    Attributes:
        total: bytes.
        other: weights beside routed experts.
        kv: keys and values.
        activations: of one pass.
        estimated: ``other`` comes from the configuration, not from the checkpoint.
        assumed: what the configuration did not say.
    """

    total: int
    other: float
    kv: float
    activations: float
    estimated: bool
    assumed: tuple[str, ...] = ()

    @property
    def left(self) -> float:
        """Bytes for routed experts; below 0 where the rest does not fit."""
        return self.total - self.other - self.kv - self.activations

    @property
    def kv_share(self) -> float:
        """Part of the memory that keys and values take."""
        return self.kv / self.total

    def slots(self, sizes: ExpertSizes) -> int:
        """Experts that fit, each as large as the largest: slots of one cache for all layers, E x layers at most."""
        return min(int(max(self.left, 0.0) // max(float(sizes.largest.max()), 1.0)), int((sizes.bytes > 0).sum()))

    def layer_slots(self, sizes: ExpertSizes) -> int:
        """Slots per layer of caches of equal size, E at most."""
        return min(int(max(self.left, 0.0) // max(float(sizes.largest.sum()), 1.0)), int(sizes.bytes.shape[1]))


def memory_budget(
    total: int, rest: DensePart, source: Source, *, context: int, batch: int = 1, chunk: int = 1,
    dense_bits: float = 16.0, value_bytes: float = VALUE_BYTES, other: int | None = None,
) -> MemoryBudget:  # fmt: skip
    """Where a device's memory goes before any expert is cached.

    Args:
        total: bytes that may be used.
        rest: of the model.
        source: its experts.
        context: tokens whose keys and values are kept, per sequence.
        batch: sequences decoded together.
        chunk: tokens of a prompt that one pass reads; 1 = decoding alone.
        dense_bits: bits of the weights beside routed experts.
        value_bytes: of keys, values and activations.
        other: bytes of the weights beside routed experts, if known.

    Raises:
        PlanError: sizes that are none, or all that is not experts does not fit.
    """
    for what, value in (("context", context), ("batch", batch), ("chunk", chunk)):
        if value < 1:
            raise PlanError(f"{what} {value} is no number of tokens or sequences: give at least 1")
    budget = MemoryBudget(
        total=total, other=float(rest.parameters * dense_bits / 8 if other is None else other),
        kv=kv_bytes(rest, context=context, batch=batch, value_bytes=value_bytes),
        activations=activation_bytes(
            rest, source, tokens=max(batch, chunk), sequences=batch, value_bytes=value_bytes
        ),
        estimated=other is None, assumed=rest.assumed,
    )  # fmt: skip
    if budget.left <= 0:
        raise PlanError(
            f"{total / GIB:.1f} GiB hold no expert: other weights take {budget.other / GIB:.1f} GiB, keys and values"
            f" {budget.kv / GIB:.1f}, activations {budget.activations / GIB:.2f}; give at least"
            f" {(total - budget.left) / GIB:.1f} GiB and room for experts, a shorter context, or fewer bits"
        )
    return budget


def _kept(window: int, context: int) -> int:
    return min(window, context) if window else context
