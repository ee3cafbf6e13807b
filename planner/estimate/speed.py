"""From a machine, the sizes of a model's parts and a replay to times: what ``Estimate.speed`` says.

::

    sizes, rest = expert_sizes(plan, source_bits=16), dense_part(config, source)
    costs = step_costs(work, machine, sizes=sizes, rest=rest, context=4096)
    clock = timeline(work, replay(work, policy="lru", slots=16), costs, link=machine.link)
    bound = bound_seconds(work, costs, least=loads_of_min_bypass, link=machine.link)
    speed(clock, bound, machine, hit_rate=(0.8, 0.75, 0.85), context=4096, peak_bytes=...)
"""

from __future__ import annotations

import numpy as np

from compressor.plan.evidence import Speed
from moescope.errors import PlanError
from planner.estimate.dense import DensePart
from planner.estimate.memory import VALUE_BYTES, ExpertSizes
from planner.machine import Machine, Processor
from planner.simulate.timeline import StepCosts, Timeline
from planner.simulate.workload import Workload
from profiler.metrics._arrays import FloatArray, ratio


def step_costs(
    work: Workload, machine: Machine, *, sizes: ExpertSizes, rest: DensePart | None, context: int,
    dense_bits: float = 16.0, value_bytes: float = VALUE_BYTES, other: int | None = None, sequences: int | None = None,
) -> StepCosts:  # fmt: skip
    """Seconds of every step of a workload on a machine.

    An expert reads its weights once and multiplies the tokens of the pass that use it; of a step, each takes the mean
    of them, and the layer's mean size by uses. Before a MoE layer come attention, router and shared experts of the
    layer and whatever decoder layers without experts stand between it and the last one; keys and values of the whole
    context are read for each sequence. After the last layer come the others and the head.

    Args:
        work: what is timed.
        machine: on which.
        sizes: of its experts.
        rest: of the model beside them; None = nothing but experts is timed.
        context: tokens of each sequence whose keys and values attention reads.
        dense_bits: bits of the weights of ``rest``.
        value_bytes: of keys and values.
        other: bytes of all weights of ``rest``, if known: those of its parts are scaled to them.
        sequences: of each pass; None = every token is of another one, as in decoding.

    Raises:
        PlanError: the workload has layers that the sizes have not.
    """
    place = {key: row for row, key in enumerate(sizes.layers)}
    for key in work.layers:
        if key not in place:
            raise PlanError(
                f"layer {key[0]} of the workload is none of the model's MoE layers: use a run of this model"
            )
    rows = [place[key] for key in work.layers]
    experts = min(work.num_experts, sizes.bytes.shape[1])
    size, weights = (np.zeros((len(rows), work.num_experts)) for _ in range(2))
    size[:, :experts], weights[:, :experts] = sizes.bytes[rows, :experts], sizes.parameters[rows, :experts]
    uses = work.counts()
    mean = ratio((size * uses).sum(axis=1), uses.sum(axis=1), empty=0.0)[:, None]
    parameters = ratio((weights * uses).sum(axis=1), uses.sum(axis=1), empty=0.0)[:, None]
    tokens = ratio(work.tokens.sum(axis=2), work.needed, empty=0.0)  # shape: (layers, passes)
    dense, tail = _dense(work, machine.device, rest, context, dense_bits, value_bytes, other, sequences)
    return StepCosts(
        dense=dense, expert=_seconds(machine.device, mean, parameters, tokens), tail=tail, size=size,
        cpu=_seconds(machine.cpu, mean, parameters, tokens),
    )  # fmt: skip


def speed(
    clock: Timeline, bound: float, machine: Machine, *, hit_rate: tuple[float, float, float], context: int,
    peak_bytes: float, batch: int = 1, coverage: float = 0.95,
) -> Speed:  # fmt: skip
    """The record of a plan's speed.

    Args:
        clock: times of the replay.
        bound: seconds that no policy beats; of :func:`planner.simulate.timeline.bound_seconds`.
        machine: on which.
        hit_rate: (value, low, high).
        context: tokens whose keys and values are kept per sequence.
        peak_bytes: of the device.
        batch: sequences that are decoded together.
        coverage: of the interval of the hit rate.
    """
    tokens = max(int(clock.pass_tokens.sum()), 1)
    return Speed(
        machine=machine.name, batch=batch, context=context, hit_rate=hit_rate[0], low=hit_rate[1], high=hit_rate[2],
        coverage=coverage, loads_per_token=clock.bytes / tokens, ms_per_token=clock.ms_per_token, p95_ms=clock.p95_ms,
        stalled=clock.stalled_share, bound_ms=1e3 * bound / tokens, resident_ms=clock.resident_ms,
        peak_bytes=round(peak_bytes),
    )  # fmt: skip


def _seconds(
    processor: Processor, size: FloatArray | float, parameters: FloatArray | float, tokens: FloatArray
) -> FloatArray:
    """:meth:`planner.machine.Processor.seconds` of arrays."""
    seconds: FloatArray = processor.overhead + np.maximum(
        size / processor.bandwidth, 2.0 * parameters * tokens / processor.flops
    )
    return seconds


def _dense(
    work: Workload, device: Processor, rest: DensePart | None, context: int, bits: float, value_bytes: float,
    other: int | None, sequences: int | None,
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """Seconds (layers, passes) before the experts of each MoE layer, and (passes,) after the last."""
    tokens = work.pass_tokens.astype(np.float64)
    dense, tail = np.zeros((work.num_layers, len(tokens))), np.zeros(len(tokens))
    if rest is None:
        return dense, tail
    byte = bits / 8 if other is None else other / rest.parameters
    read = (tokens if sequences is None else float(sequences)) * context * value_bytes
    decoder = []
    for layer in rest.layers:
        kept = min(layer.window, context) / max(context, 1) if layer.window else 1.0
        size = layer.parameters * byte + layer.kv_values * kept * read
        decoder.append(_seconds(device, size, float(layer.parameters), tokens))
    before = 0
    for row, (layer_number, step) in enumerate(work.layers):
        if step == 0:
            dense[row] = sum(decoder[before : layer_number + 1])
            before = layer_number + 1
    tail += sum(decoder[before:])
    tail += _seconds(device, rest.head * byte, float(rest.head), tokens)
    return dense, tail
