"""Experts with narrower weights in place of their own: what they put out, as a whole and one projection at a time.

Nothing in the model is changed. A routed expert is put together from its layout's own pieces, so that each first
projection is multiplied with the inputs once per width, whatever stands beside it; activation function, biases, clamps
and norms are the module's. A shared expert is an ordinary module: a twin of it runs, with other weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.families import ExpertsLayout, SharedExperts

WHOLE = "all"
"""All projections of an expert at once."""

Weights = dict[str, Tensor]
"""Part (gate, up, down, in this order; no gate where there is none) -> (out, in) float32."""

_SHARED_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"),
    ("up_proj", "down_proj"),
)
"""What shared experts call their projections; of two, the first holds the gate too where it has twice the neurons."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Narrowed(Protocol):
    """One expert and the tokens that it runs on.

    Attributes:
        output: (tokens, hidden) float32, with the weights as they are.
    """

    output: Tensor

    def outputs(self, weights: Mapping[str, Tensor], *, alone: bool) -> Iterator[tuple[str, Tensor]]:
        """(part, outputs (tokens, hidden)): all of these weights in place, and with ``alone`` each part's alone."""


class WeightedExperts(Protocol):
    """Experts of one kind in one layer.

    Attributes:
        count: those whose weights can be read.
    """

    count: int

    def weights(self, number: int) -> Weights:
        """The weights of one expert."""

    def on(self, number: int, weights: Weights, inputs: Tensor) -> Narrowed:
        """One expert, whose weights have been read, on (tokens, hidden) float32 inputs."""


class RoutedExperts:
    """The routed experts of a module; see :class:`WeightedExperts`. Those without weights count not."""

    def __init__(self, layout: ExpertsLayout, module: Any) -> None:
        self.layout, self.module, self.count = layout, module, layout.num_weighted

    def weights(self, number: int) -> Weights:
        """The weights of one expert."""
        gate, up = self.layout.first_projections(self.module, number)
        found = {"gate": gate, "up": up, "down": self.layout.down_weight(self.module, number)}
        return {part: weight.detach().float() for part, weight in found.items() if weight is not None}

    def on(self, number: int, weights: Weights, inputs: Tensor) -> NarrowedRouted:
        """One expert, whose weights have been read, on (tokens, hidden) float32 inputs."""
        return NarrowedRouted(self, number, weights, inputs)


class NarrowedRouted:
    """A routed expert; see :class:`Narrowed`."""

    def __init__(self, experts: RoutedExperts, number: int, weights: Weights, inputs: Tensor) -> None:
        self._layout, self._module, self._number = experts.layout, experts.module, number
        self._own, self._inputs = weights, inputs
        self._halves = self._first(self._own)
        self._activation = self._activate(self._halves)
        self.output = self._second(self._activation, self._own["down"])

    def difference(self) -> float:
        """How far ``output`` is from what the layout itself computes, relative; it proves the pieces right."""
        _, plain = self._layout.run_expert(self._module, self._number, self._inputs)
        return float((plain - self.output).norm() / plain.norm().clamp_min(torch.finfo(plain.dtype).tiny))

    def outputs(self, weights: Mapping[str, Tensor], *, alone: bool) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Narrowed`."""
        halves = self._first(weights)
        if not alone:
            yield WHOLE, self._second(self._activate(halves), weights["down"])
            return
        # Two products with a matrix are one: small products cost their call.
        both = torch.stack([self._activate(halves), self._activation])
        yield from zip((WHOLE, "down"), self._second(both, weights["down"]), strict=True)
        singly = torch.stack([self._activate({**self._halves, part: half}) for part, half in halves.items()])
        yield from zip(halves, self._second(singly, self._own["down"]), strict=True)

    def _first(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(tokens, I) each: what gate and up put out, before their biases."""
        return {part: self._inputs @ weight.T for part, weight in weights.items() if part != "down"}

    def _activate(self, halves: Mapping[str, Tensor]) -> Tensor:
        layout, joined = self._layout, halves["up"]
        if layout.gated:
            both = [halves["gate"], halves["up"]]
            joined = torch.stack(both, 2).flatten(1) if layout.interleaved else torch.cat(both, 1)
        bias = layout.bias(self._module, layout.up_name, self._number)
        return layout.activate(self._module, joined if bias is None else joined + bias.to(joined.dtype))

    def _second(self, activation: Tensor, down: Tensor) -> Tensor:
        layout, output = self._layout, activation @ down.T
        bias = layout.bias(self._module, layout.down_name, self._number)
        output = output if bias is None else output + bias.to(output.dtype)
        return self._module.post_expert_norm(output) if layout.post_norm else output


class SharedTogether:
    """The shared experts of a layer, merged in one module, as its expert 0; see :class:`WeightedExperts`."""

    def __init__(self, shared: SharedExperts) -> None:
        self.module, self.names = shared.module, _shared_names(shared.module)
        self.count = 1 if self.names else 0

    def weights(self, number: int) -> Weights:
        """The weights of all of them."""
        found = [_projection(self.module, name).detach().float() for name in self.names]
        width = found[-1].shape[1]
        if len(found) == 2 and len(found[0]) == 2 * width:
            found = [found[0][:width], found[0][width:], found[1]]
        return dict(zip(("gate", "up", "down")[-len(found) :], found, strict=True))

    def on(self, number: int, weights: Weights, inputs: Tensor) -> NarrowedShared:
        """All of them, whose weights have been read, on (tokens, hidden) float32 inputs."""
        return NarrowedShared(self, weights, inputs)


class NarrowedShared:
    """Shared experts; see :class:`Narrowed`."""

    def __init__(self, experts: SharedTogether, weights: Weights, inputs: Tensor) -> None:
        self._twin, self._names = _twin(experts.module), experts.names
        self._own, self._inputs = weights, inputs
        self.output = self._run({})

    def outputs(self, weights: Mapping[str, Tensor], *, alone: bool) -> Iterator[tuple[str, Tensor]]:
        """See :class:`Narrowed`."""
        yield WHOLE, self._run(weights)
        for part, weight in weights.items() if alone else ():
            yield part, self._run({part: weight})

    def _run(self, changed: Mapping[str, Tensor]) -> Tensor:
        weights = {**self._own, **changed}
        parts = list(weights.values())
        if len(self._names) < len(parts):  # gate and up are one matrix
            parts = [torch.cat(parts[:2]), parts[2]]
        for name, weight in zip(self._names, parts, strict=True):
            _put(self._twin, name, weight)
        result = self._twin(self._inputs)
        output: Tensor = result[0] if isinstance(result, (tuple, list)) else result
        return output


def _shared_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the projections in the module; none where they are called otherwise, or where experts stand apart."""
    own = {name.removesuffix(".weight") for name, tensor in module.named_parameters() if tensor.ndim > 1}
    names: tuple[str, ...] = next((names for names in _SHARED_NAMES if own == set(names)), ())
    apart = any(isinstance(getattr(module, name), Tensor) and len(getattr(module, name)) > 1 for name in names)
    return () if apart else names


def _projection(module: nn.Module, name: str) -> Tensor:
    """A projection as (out, in); one expert that is stacked stands in axis 0 alone."""
    owner: Any = getattr(module, name)
    weight: Tensor = owner if isinstance(owner, Tensor) else owner.weight
    return weight[0] if weight.ndim == 3 else weight


def _put(module: nn.Module, name: str, weight: Tensor) -> None:
    owner: Any = getattr(module, name)
    parameters: dict[str, Any] = module._parameters if isinstance(owner, Tensor) else owner._parameters
    place = name if isinstance(owner, Tensor) else "weight"
    parameters[place] = weight.reshape(parameters[place].shape)


def _twin(module: nn.Module) -> nn.Module:
    """The same module with tensors in 32 bits and without hooks; a deep copy would copy whatever hooks belong to."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        held = {name: None if value is None else _plain(value) for name, value in module.__dict__[kind].items()}
        twin.__dict__[kind] = held
    children = module._modules.items()
    twin.__dict__["_modules"] = {name: None if child is None else _twin(child) for name, child in children}
    twin.__dict__.update({name: OrderedDict() for name in _HOOKS})
    return twin


def _plain(value: Tensor) -> Tensor:
    return value.detach().float() if value.is_floating_point() else value.detach()
