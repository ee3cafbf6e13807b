"""One decoder layer at work in a model whose other layers only hand on what they are given.

The model's own forward runs each time, so masks, position embeddings and whatever else a family gives its layers are
made by its own code, and hooks see a forward like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from moescope.errors import ModelError


class Relay:
    """Runs the decoder layers of a model one at a time.

    Args:
        stack: the decoder layers.

    Attributes:
        current: the layer that works.
        entering: what enters it: the hidden states that the layer before passed on; None for the first layer, which
            gets what the model makes of its input.
        left: what it returned in the last forward.
        passed_on: what entered the layer after it; None for the last layer.
    """

    def __init__(self, stack: nn.ModuleList) -> None:
        self._stack = stack
        self.current = 0
        self.entering: Tensor | None = None
        self.left: Tensor | None = None
        self.passed_on: Tensor | None = None
        self._before: Any = None

    @contextmanager
    def working(self, index: int) -> Iterator[None]:
        """While entered, layer ``index`` works and the others hand on."""
        self.current = index
        layer = self._stack[index]
        handles = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.register_forward_hook(self._leave, with_kwargs=True),
        ]
        others = [(place, other) for place, other in enumerate(self._stack) if place != index]
        for place, other in others:
            other.__dict__["forward"] = partial(self._hand_on, place)
        try:
            yield
        finally:
            for _, other in others:
                del other.__dict__["forward"]
            for handle in handles:
                handle.remove()
            self.entering = self.left = self.passed_on = None

    def _hand_on(self, place: int, *args: Any, **kwargs: Any) -> Tensor:
        hidden = _hidden(self._stack[place], args, kwargs)
        if place == self.current + 1:
            self.passed_on = hidden
        return hidden

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.passed_on = None
        hidden = _hidden(layer, args, kwargs)
        if self.entering is not None:
            if self.entering.shape != hidden.shape or self.entering.dtype != hidden.dtype:
                raise ModelError(f"{_place(layer, self.current)} changes the shape of the hidden states: {_REMEDY}")
            args, kwargs = ((self.entering, *args[1:]), kwargs) if args else (args, {**kwargs, _NAME: self.entering})
        self._before = _members([args, kwargs])
        return args, kwargs

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ModelError(
                f"{_place(layer, self.current)} returns a {type(output).__name__}: it hands more than hidden states to"
                f" the next, {_REMEDY}"
            )
        if _members([args, kwargs]) != self._before:
            raise ModelError(
                f"{_place(layer, self.current)} leaves values for later layers beside the hidden states, {_REMEDY}"
            )
        self.left, self._before = output, None


_NAME = "hidden_states"
_REMEDY = "and cannot be run alone; leave out --layer-stream"


def _hidden(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get(_NAME)
    if not isinstance(hidden, Tensor):
        raise ModelError(f"{type(layer).__name__} is not called with hidden states first, {_REMEDY}")
    return hidden


def _members(values: Any) -> list[Any]:
    """What containers hold, by identity: it differs after something was put in."""
    if isinstance(values, dict):
        return [(name, _members(value)) for name, value in values.items()]
    if isinstance(values, (list, tuple)):
        return [_members(value) for value in values]
    return [id(values)]


def _place(layer: nn.Module, index: int) -> str:
    return f"layer {index} ({type(layer).__name__})"
