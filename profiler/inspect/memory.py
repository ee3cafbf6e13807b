"""What recording takes beside the model: sums that are kept, work on one batch, and shards on their way to the disk.

Everything follows from shapes, so that it can be said before a weight is read. Sums are what recorders hold between two
shards; a test compares them with what the recorders hold indeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from profiler.capture.levels import RecordingOptions
from store import NUM_PARTS

if TYPE_CHECKING:
    from profiler.capture.discovery import MoELayer, MoEModel

DOUBLE = 8
SHARDS = 1.5
"""Sums on their way to the disk: lists of 32 bits, and the Parquet writer's copy of the largest of them."""

TRACE_COPIES = 3
"""The trace as it is held, in order, and packed in lists."""

FLUSH_BYTES = 128 << 20
"""Trace held in memory before it is written."""

PARTS = 1 << 24
"""Values that recorders of routing work on at once, and weights that are compared."""

SAMPLED = 1 << 25
"""Outputs of all experts for sampled tokens that are in memory at once."""

GROUP_TOKENS = 256
"""Sampled tokens that are compared as one set."""

MOST_COMPARED = 1024
"""Experts of a layer above which no pairs are kept."""

MATCHED_WIDTH = 4642
"""Neurons of an expert above which they are not matched: one pair takes too long."""

WAITING_TOKENS = 8192
"""Sampled tokens of a layer whose inputs wait at most, at level errors."""

WIDTHS = 6
"""Bit widths that are tried at level errors."""

LIBRARIES = 256 << 20
"""Buffers of the libraries (allocators, threads, Parquet) that grow once, whatever the model: 45 to 95 MiB with two
threads, and more with more of them."""


@dataclass(frozen=True)
class ExtraMemory:
    """Bytes that recording takes at most beside the bare forward.

    Attributes:
        statistics: sums by level.
        working: copies that recorders make of one batch.
        trace: selections that wait to be written.
        waiting: sampled inputs that wait to be worked off.
    """

    statistics: dict[str, int]
    working: int
    trace: int
    waiting: int = 0

    @property
    def total(self) -> int:
        """All of it, at the moment when a shard is written."""
        return round(SHARDS * sum(self.statistics.values())) + max(self.working, self.trace) + self.waiting + LIBRARIES


def extra_memory(
    found: MoEModel, options: RecordingOptions, *, batch: int, tokens: int, domains: int = 1, phases: int = 1
) -> ExtraMemory:
    """The peak of what a collection takes beside the model and its forward.

    Args:
        found: the model.
        options: what is recorded.
        batch: tokens of one batch, padding included.
        tokens: tokens of the whole collection.
        domains: labels of the text.
        phases: 2 where decoding is recorded as well.
    """
    chosen = -(-sum(layer.top_k for layer in found.layers) * 6 // options.trace_every) if options.keep_trace else 0
    if options.router_scores:
        width = max(layer.top_k for layer in found.layers) + 8 if options.router_scores < 0 else options.router_scores
        chosen += -(-len(found.layers) * (6 * width + 4) // options.scores_every)
    shapes, sampled, trying = [_Shape(found, layer) for layer in found.layers], 0, 0
    if "errors" in options.levels:
        sampled = sampled_tokens(tokens, options.errors_every)
        trying = max(_tried(shape, sampled) for shape in shapes)
    return ExtraMemory(
        statistics=statistics_bytes(found, options, domains=domains, phases=phases),
        # Widths are tried between forwards, when no batch is being worked on.
        working=max(working_bytes(found, options, batch), trying),
        trace=TRACE_COPIES * min(FLUSH_BYTES, tokens * chosen),
        waiting=sum(_waiting(shape, sampled) for shape in shapes),
    )


def sampled_tokens(tokens: int, every: int) -> int:
    """Tokens of a layer that level errors takes at most; a sample is larger than its share by chance."""
    return min(WAITING_TOKENS, tokens, round(1.2 * tokens / every) + 32)


def statistics_bytes(
    found: MoEModel, options: RecordingOptions, *, domains: int = 1, phases: int = 1
) -> dict[str, int]:
    """Bytes of the sums by level, as recorders hold them; the levels that are not recorded are left out."""
    groups, vectors = domains * phases, (domains if options.vectors_per_domain else 1) * phases
    shapes = [_Shape(found, layer) for layer in found.layers]
    # Of every decoder layer, and not of its experts: the residual stream, and attention per head.
    beside = {"activations": 9, "attention": _number(found, "num_attention_heads") + 1}
    return {
        level: sum(_SUMS[level](shape, groups, vectors) for shape in shapes if level in _SUMS)
        + DOUBLE * groups * len(found.stack) * beside.get(level, 0)
        for level in options.levels
    }


class _Shape:
    """The sizes of one MoE layer."""

    def __init__(self, found: MoEModel, layer: MoELayer) -> None:
        self.experts, self.top_k, self.width = layer.num_experts, layer.top_k, layer.expert_width
        hidden = _number(found, "hidden_size")
        self.errors_of = self.experts if self.experts <= MOST_COMPARED else 0
        self.hidden = layer.layout.hidden_size if layer.layout is not None else hidden
        down: Any = layer.shared.down if layer.shared is not None else None
        self.shared = int(layer.shared is not None)
        self.shared_width = int(down.weight.shape[1]) if getattr(down, "weight", None) is not None else 0
        self.shared_hidden = hidden * self.shared
        self.neurons = self.experts * self.width + self.shared_width


def _routing(shape: _Shape, groups: int, vectors: int) -> int:
    """Load, scores, histograms, ranks, pairs, and selections and gate weights by part of the text."""
    each = 6 + 3 + 3 * shape.top_k + 2 * 8
    parts = 2 * NUM_PARTS * shape.experts
    return DOUBLE * (groups * (shape.experts * each + 5 * 32 + 12) + vectors * 2 * shape.experts**2 + parts)


def _activations(shape: _Shape, groups: int, vectors: int) -> int:
    """Outputs, neurons and channels (of each one maximum in 32 bits), pairs, and the norms of the weights."""
    scalars = (shape.experts + shape.shared) * 14 + 7
    channels = shape.experts * shape.hidden + shape.shared_hidden
    weights = 3 * shape.neurons + shape.experts * shape.hidden
    lists = vectors * (DOUBLE * (4 * shape.neurons + 3 * channels + shape.experts**2) + 4 * (shape.neurons + channels))
    parts = 2 * NUM_PARTS * (shape.experts + 2 * shape.shared)
    return DOUBLE * (groups * scalars + parts) + lists + 4 * weights


def _similarity(shape: _Shape, groups: int, vectors: int) -> int:
    """Outputs, four matrices of pairs, and for up to four matrices of weights three of pairs in 32 bits, row by row."""
    if shape.experts > MOST_COMPARED:
        return 0
    sums = DOUBLE * (shape.experts * shape.hidden + 4 * shape.experts**2)
    return vectors * sums + 4 * shape.experts * (3 * 4 * shape.experts + 34)


def _errors(shape: _Shape, groups: int, vectors: int) -> int:
    """Rows of both tables as they are written; between two shards there are none."""
    experts, parts = shape.errors_of + shape.shared, 4
    return DOUBLE * (groups * experts * (parts * (2 + WIDTHS) + 3) + experts * (parts - 1) * (3 + WIDTHS))


def _waiting(shape: _Shape, sampled: int) -> int:
    """Sampled inputs on the host, in 32 bits at most; ids, gate weights and groups."""
    routed = (4 * shape.hidden + 12 * shape.top_k + 8) * min(1, shape.errors_of)
    return sampled * (routed + shape.shared * (4 * shape.shared_hidden + 20))


def _tried(shape: _Shape, sampled: int) -> int:
    """One expert in 32 bits: its weights, those of a grid, what finding a grid takes, and outputs of its tokens.

    The busiest expert is taken to have four times its share of the tokens.
    """
    rows = min(sampled, 4 * sampled * shape.top_k // max(1, shape.experts))
    routed = 4 * (13 * shape.width * shape.hidden + rows * (8 * shape.width + 6 * shape.hidden))
    of_shared = 13 * shape.shared_width * shape.shared_hidden
    shared = 4 * (of_shared + sampled * (4 * shape.shared_width + 6 * shape.shared_hidden))
    return max(routed, shared)


def _moments(shape: _Shape, groups: int, vectors: int) -> int:
    return DOUBLE * vectors * shape.hidden**2


def _lookahead(shape: _Shape, groups: int, vectors: int) -> int:
    """Three distances, two inputs, position 0 apart."""
    return DOUBLE * groups * 3 * 2 * 2 * (4 + 2 * 9)


def _gradients(shape: _Shape, groups: int, vectors: int) -> int:
    return DOUBLE * (vectors * 4 * shape.neurons + groups * 3 * (shape.experts + shape.shared))


_SUMS: dict[str, Callable[[_Shape, int, int], int]] = {
    "routing": _routing,
    "activations": _activations,
    "similarity": _similarity,
    "errors": _errors,
    "moments": _moments,
    "lookahead": _lookahead,
    "gradients": _gradients,
}
"""Bytes of one layer by level; from its shape, the (domain, phase) groups, and the groups that vectors are apart by."""


def working_bytes(found: MoEModel, options: RecordingOptions, tokens: int, width: float = 4.0) -> int:
    """Copies that recorders make of one batch beside what its forward needs anyway.

    Selections and router scores of all layers wait for the end of the forward; what happens inside the experts is added
    up layer by layer. ``width`` is the bytes of a value in the model's type.
    """
    shapes = [_Shape(found, layer) for layer in found.layers]
    waiting = sum(tokens * (8 * shape.experts + 28 * shape.top_k) for shape in shapes)
    scores = sum(tokens * shape.experts for shape in shapes)
    size: float = waiting + 10 * 4 * min(scores, max(PARTS, tokens * max(shape.experts for shape in shapes)))
    if "activations" in options.levels:
        size += max(_inside(shape, tokens, width) for shape in shapes)
    if "similarity" in options.levels:
        sampled = -(-tokens // options.similarity_every)
        # Of every layer, seven tokens at most wait for more.
        size += max(_compared(shape, sampled) for shape in shapes) + sum(7 * 4 * shape.hidden for shape in shapes)
    if "moments" in options.levels:
        # The matrices of all layers wait for the end of the forward.
        size += sum(4 * shape.hidden**2 for shape in shapes) + max(2 * 4 * tokens * shape.hidden for shape in shapes)
    if "lookahead" in options.levels:
        hidden = _number(found, "hidden_size")
        size += round(tokens * hidden * width * 12) + tokens * 6 * 8 * max(shape.top_k + 8 for shape in shapes)
    if "attention" in options.levels:
        size += 2 * 4 * min(1 << 25, tokens * tokens * _number(found, "num_attention_heads"))
    if "predictions" in options.levels:
        size += (width + 4) * min(PARTS, tokens * _number(found, "vocab_size")) + 16 * tokens
    if "gradients" in options.levels:
        size += _graph(found, shapes, tokens, width)
    return round(size)


def _inside(shape: _Shape, tokens: int, width: float) -> float:
    """The rows inside the experts, kept until they are added up, sorted and in 32 bits; and the residual stream."""
    rows = shape.top_k * (shape.hidden + shape.width)
    stream = 6 * 4 * max(shape.hidden, shape.shared_hidden)
    return tokens * (rows * (width + 4) + stream + 4 * shape.experts + 4 * shape.top_k**2)


def _compared(shape: _Shape, sampled: int) -> float:
    """What all experts put out for a group of tokens, and its Gram matrices; or, once, weights side by side and a
    match of neurons."""
    if shape.experts > MOST_COMPARED:
        return 0
    tokens = min(sampled + 7, GROUP_TOKENS)
    outputs = 1.5 * 4 * min(SAMPLED, tokens * shape.experts * shape.hidden) + 4 * shape.experts * tokens**2
    weights = 2 * 4 * min(PARTS, 3 * shape.neurons * shape.hidden)
    matching = 4 * shape.width * (3 * shape.width + 12 * shape.hidden) if shape.width <= MATCHED_WIDTH else 0
    return max(outputs, weights, matching)


def _graph(found: MoEModel, shapes: list[_Shape], tokens: int, width: float) -> float:
    """What a backward needs of every layer, the logits with their gradient, and the gradients that are under way."""
    hidden, heads = _number(found, "hidden_size"), _number(found, "num_attention_heads")
    inside = sum(shape.top_k * (2 * shape.hidden + 4 * shape.width) for shape in shapes)
    attention = len(found.stack) * (12 * hidden + 4 * heads)
    return 1.25 * tokens * (inside + attention + 3 * _number(found, "vocab_size")) * width


def _number(found: MoEModel, name: str) -> int:
    try:
        return int(getattr(found.config, name, 0) or 0)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return 0  # a configuration whose layers differ in it
