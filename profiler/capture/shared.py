"""Watch the shared experts of a layer through hooks on their modules; they are ordinary feed-forward modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks

Take = Callable[[MoELayer, "Tensor | None", "Tensor | None", "Tensor | None", Tensor], None]
"""``take(layer, inputs (rows, hidden) or None, gate (rows,) or None, activation (..., width) or None, output)``

The activation is the tensor that the model goes on with, graph included.
"""


def watch_shared(layer: MoELayer, hooks: Hooks, take: Take) -> None:
    """Hook the shared experts of a layer, if it has any."""
    shared = layer.shared
    if shared is None:
        return
    held: list[Tensor] = []

    def before_down(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        held[:] = [inputs]

    def after_all(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        activation = held.pop() if held else None
        result = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(result, Tensor):
            return
        with torch.no_grad():
            flat = result.detach().reshape(-1, result.shape[-1])
            inputs = args[0].detach().reshape(-1, args[0].shape[-1]) if args else None
            take(layer, inputs, _gate(shared.gate, args), activation, flat)

    if shared.down is not None:
        hooks.before(shared.down, before_down)
    hooks.after(shared.module, after_all, first=True)


def _gate(gate: Any, args: tuple[Any, ...]) -> Tensor | None:
    """(rows,) the weight by which the block multiplies the shared output; computed again, past the gate's hooks."""
    if gate is None or not args:
        return None
    # Where accelerate keeps the weight on disk, its forward fetches it.
    inputs = args[0].detach()
    return torch.sigmoid(gate.forward(inputs.reshape(-1, inputs.shape[-1]))).reshape(-1)
