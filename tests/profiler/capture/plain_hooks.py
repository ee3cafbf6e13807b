"""What a model does, written down by plain hooks on its experts, routers, norms and shared experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from profiler.capture.discovery import MoELayer, inspect_model


@dataclass
class Seen:
    """What one layer did, a list entry per forward."""

    layer: MoELayer
    hidden: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    residual: list[Tensor | None] = field(default_factory=list)
    shared: list[tuple[Tensor, Tensor | None, Tensor | None]] = field(default_factory=list)


@contextmanager
def hooked(model: nn.Module) -> Iterator[list[Seen]]:
    """While entered, plain hooks write down what goes into and comes out of experts, routers and shared experts."""
    found = inspect_model(model)
    seen = [Seen(layer) for layer in found.layers]
    passed: list[tuple[Tensor, Tensor]] = []
    handles = []
    for entry in seen:
        experts = entry.layer.experts
        handles.append(experts.register_forward_pre_hook(_calls(entry, passed), with_kwargs=True))
        handles.append(experts.register_forward_hook(_results(entry)))
        if entry.layer.router is not None:
            handles.append(entry.layer.router.register_forward_hook(_scores(entry)))
        handles += _watch_shared(entry)
    blocks = [layer.block for layer in found.layers if layer.block not in (None, found.stack[layer.layer])]
    inside = {id(module) for block in blocks for module in block.modules()}  # norms there see no residual stream
    for decoder in found.stack:
        for module in decoder.modules():
            if id(module) not in inside:
                handles.append(module.register_forward_hook(_passing(passed)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _calls(entry: Seen, passed: list[tuple[Tensor, Tensor]]) -> Any:
    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, ids, weights = (*args, *kwargs.values())[:3]
        flat = hidden.detach().reshape(-1, hidden.shape[-1]).clone()
        entry.hidden.append(flat)
        entry.ids.append(ids.detach().clone())
        entry.weights.append(weights.detach().clone())
        same = [(output, entered) for output, entered in passed if output.numel() == flat.numel()]
        norms = [entered for output, entered in same if torch.equal(output.reshape(flat.shape), flat)]
        entry.residual.append(norms[-1].reshape(flat.shape).clone() if norms else None)
        passed.clear()

    return see


def _passing(passed: list[tuple[Tensor, Tensor]]) -> Any:
    """The norm before the experts is whatever gave values equal to their input."""

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and output.shape == args[0].shape:
            passed[:] = [*passed[-7:], (output.detach(), args[0].detach())]

    return see


def _results(entry: Seen) -> Any:
    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, (tuple, list)) else output
        entry.results.append(result.detach().reshape(-1, result.shape[-1]).clone())

    return see


def _scores(entry: Seen) -> Any:
    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits = output if isinstance(output, Tensor) else output[entry.layer.logits_index]
        entry.logits.append(logits.detach().reshape(-1, logits.shape[-1]).clone())

    return see


def _watch_shared(entry: Seen) -> list[Any]:
    shared = entry.layer.shared
    if shared is None:
        return []
    held: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        held[:] = [args[0].detach().reshape(-1, args[0].shape[-1]).clone()]

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        flat = output.detach().reshape(-1, output.shape[-1]).clone()
        gate = None
        if shared.gate is not None:
            inputs = args[0].detach().reshape(-1, args[0].shape[-1])
            gate = torch.sigmoid(inputs @ shared.gate.weight.T)[:, 0]
        entry.shared.append((flat, held[0] if held else None, gate))

    handles = [shared.module.register_forward_hook(after)]
    return [shared.down.register_forward_pre_hook(before), *handles] if shared.down is not None else handles
