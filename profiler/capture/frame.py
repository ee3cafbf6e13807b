"""A forward of the watched model that is running, and what has been seen of it so far."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from compressor.families import Routed
from profiler.capture.batch import LayerKey, Tokens
from profiler.capture.discovery import MoELayer, MoEModel
from profiler.capture.inputs import ForwardInputs
from profiler.capture.routing import LayerRouting
from profiler.capture.sequences import BatchRows


@dataclass
class Frame:
    """One forward, from its first module to its last.

    Attributes:
        inputs: what the model was given.
        tokens: the real tokens among it.
        rows: the sequences that they belong to.
        sampled: whether the experts are recomputed in this forward, to prove the capture right.
        routed: per layer, what its router was given and returned last.
        calls: per layer, how often its experts have been called.
        chosen: per layer and step, the logits and ids that its router returned.
        routing: per layer, what its experts were called with.
        parts: the tokens of calls that have a part of the forward's rows only, by the stack of their layers.
        passed: the last few (module, output, input) that may stand between the residual stream and the experts.
    """

    inputs: ForwardInputs
    tokens: Tokens
    rows: BatchRows
    sampled: bool
    began: float = field(default_factory=time.perf_counter)
    thread: int = field(default_factory=threading.get_ident)
    routed: dict[LayerKey, Routed] = field(default_factory=dict)
    calls: Counter[LayerKey] = field(default_factory=Counter)
    parts: dict[str, Tokens] = field(default_factory=dict)
    chosen: dict[LayerKey, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    routing: dict[LayerKey, LayerRouting] = field(default_factory=dict)
    passed: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)

    def tokens_of(self, layer: MoELayer, rows: int) -> Tokens | None:
        """The tokens that a call of so many rows has: all, or those of the layer's kind; None where neither fits."""
        if rows == self.tokens.rows:
            return self.tokens
        types = self.inputs.expert_types
        if types is None or types.numel() != self.tokens.rows:
            return None
        seen = (types.reshape(-1) != 0) if layer.stack == "vision" else (types.reshape(-1) == 0)
        if int(seen.sum()) != rows:
            return None
        if layer.stack not in self.parts:
            self.parts[layer.stack] = self.tokens.part(seen.nonzero()[:, 0])
        return self.parts[layer.stack]

    def saw_module(self, module: nn.Module, output: object, entered: object) -> None:
        """A module of a decoder layer has run; a norm's output is what the experts are called with."""
        if isinstance(output, Tensor) and isinstance(entered, Tensor) and output.shape == entered.shape:
            self.passed = [*self.passed[-3:], (module, output, entered)]

    def norm_before(self, hidden: Tensor) -> tuple[nn.Module, Tensor] | None:
        """The norm that gave ``hidden``, and what it was given; None where that was not seen.

        The norm is the module whose output is the very memory that ``hidden`` reads: no name has to be known.
        """
        for module, output, entered in reversed(self.passed):
            if output.data_ptr() == hidden.data_ptr() and output.numel() == hidden.numel():
                return module, entered.detach()
        return None

    def residual_before(self, hidden: Tensor) -> Tensor | None:
        """(rows, hidden) the residual stream that the experts' input was normed from; None where that was not seen."""
        found = self.norm_before(hidden)
        return None if found is None else found[1].reshape(hidden.shape)


def modules_beside(found: MoEModel) -> list[nn.Module]:
    """The modules beside the MoE blocks of decoder layers that hold neither experts nor routers: norms are there."""
    inside = {id(module) for layer in found.layers for module in (layer.experts, *layer.routers)}
    indices = sorted({layer.layer for layer in found.layers})
    return [module for index in indices for module in _beside(found.stack[index], inside)]


def _beside(module: nn.Module, inside: set[int]) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if any(id(inner) in inside for inner in child.modules()):
            # T5's layers keep their parts in a list.
            yield from _beside(child, inside) if nn.ModuleList in (type(child), type(module)) else ()
        elif isinstance(child, nn.ModuleList):
            yield from child.children()  # LongCat's norms stand in lists
        else:
            yield child
            yield from child.children() if "norm" in name else ()  # DBRX's in one module with the attention
