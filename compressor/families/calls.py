"""How experts are called: where a call holds the tokens, the selected experts and the gate weights.

Nearly all families call ``experts(hidden, ids, weights)``. The readers here are for that and for the ways in which
single families differ; an adapter (:mod:`compressor.families.adapters`) names its reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moescope.errors import CaptureError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """A router, what it was given first, and what it returned, untouched."""

    router: Any
    hidden: Any
    output: Any


class Call(Protocol):
    """One call of an experts module, after it has run.

    Attributes:
        module: the module.
        args: its positional arguments.
        kwargs: its named arguments, in the order of the call.
        result: what it returned.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def routed(self) -> Routed | None:
        """The last word of its router before it returned; None where the router has no module of its own."""

    @property
    def selection(self) -> Selection:
        """What its reader made of it."""


@dataclass(frozen=True)
class Selection:
    """What experts were called with, token by token.

    Attributes:
        hidden: (tokens, width) their inputs x.
        ids: (tokens, k) int64 selected experts; -1 = none.
        weights: (tokens, k) gate weights.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor


def read_call(call: Call) -> Selection:
    """``experts(hidden, ids, weights)``, by position or by any names in that order; axes before the last are tokens."""
    hidden, ids, weights = (*call.args, *call.kwargs.values())[:3]
    return Selection(flat(hidden), flat(ids), flat(weights))


def read_sequences(call: Call) -> Selection:
    """The same with one selection per sequence: hidden (batch, tokens, width), ids and weights (batch, k)."""
    hidden, ids, weights = (*call.args, *call.kwargs.values())[:3]
    length = hidden.shape[1]
    return Selection(flat(hidden), ids.repeat_interleave(length, 0), weights.repeat_interleave(length, 0))


def read_router(call: Call) -> Selection:
    """A whole block that is called with the hidden states and asks its router, which returns (logits, weights, ids)."""
    hidden = (*call.args, *call.kwargs.values())[0]
    _, weights, ids = routed(call).output
    return Selection(flat(hidden), flat(ids), flat(weights))


def read_output(call: Call) -> Tensor:
    """(tokens, hidden) the experts' weighted sum, where it is all that the module returns."""
    result: Tensor = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    return flat(result)


def flat(values: Tensor) -> Tensor:
    """(tokens, width) whatever axes there were before the last."""
    return values if values.ndim == 2 else values.reshape(-1, values.shape[-1])


def routed(call: Call) -> Routed:
    """What the router said, for readers that cannot do without.

    Raises:
        CaptureError: no router was seen.
    """
    if call.routed is None:
        name = type(call.module).__name__
        raise CaptureError(f"{name} ran without a router that was seen: its adapter cannot know the selection")
    return call.routed
