"""Which weights belong to which decoder layer, and which stand around them."""

from __future__ import annotations

from typing import Any

from profiler.capture.discovery import inspect_model
from profiler.stream.checkpoint import Checkpoint
from profiler.stream.skeleton import output_head


class Parts:
    """Names of the weights around the decoder layers, and in each of them.

    The language-model head is in none, unless it is tied to the embeddings: hidden states are all that is wanted.

    Attributes:
        outside: the weights around the layers.
        head: those of the head.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        paths = {id(module): name for name, module in model.named_modules()}
        stack, head = inspect_model(model).stack, output_head(model)
        self._layers = [checkpoint.names(f"{paths[id(layer)]}.") for layer in stack]
        self.head = checkpoint.names(f"{paths[id(head)]}.") if head is not None else []
        elsewhere = {name for names in self._layers for name in names} | set(self.head)
        self.outside = [name for name in checkpoint.names("") if name not in elsewhere]

    def layer(self, index: int) -> list[str]:
        """The weights of a decoder layer; none behind the last."""
        return self._layers[index] if index < len(self._layers) else []
