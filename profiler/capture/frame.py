"""A forward of the watched model that is running, and what has been seen of it so far."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from torch import Tensor

from profiler.capture.batch import LayerKey, Tokens
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
        chosen: per layer, the logits and ids that its router returned.
        routing: per layer, what its experts were called with.
        passed: the last few (output, input) of modules that may stand between the residual stream and the experts.
    """

    inputs: ForwardInputs
    tokens: Tokens
    rows: BatchRows
    sampled: bool
    began: float = field(default_factory=time.perf_counter)
    thread: int = field(default_factory=threading.get_ident)
    chosen: dict[LayerKey, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    routing: dict[LayerKey, LayerRouting] = field(default_factory=dict)
    passed: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def saw_module(self, output: object, entered: object) -> None:
        """A module of a decoder layer has run; a norm's output is what the experts are called with."""
        if isinstance(output, Tensor) and isinstance(entered, Tensor) and output.shape == entered.shape:
            self.passed = [*self.passed[-3:], (output, entered)]

    def residual_before(self, hidden: Tensor) -> Tensor | None:
        """(rows, hidden) the residual stream that the experts' input was normed from; None where that was not seen.

        The norm is the module whose output is the very memory that the experts read: no name has to be known.
        """
        for output, entered in reversed(self.passed):
            if output.data_ptr() == hidden.data_ptr() and output.numel() == hidden.numel():
                return entered.detach().reshape(hidden.shape)
        return None
