"""Stand in the library's attention interface: see what an attention function got, and ask it where it looked.

transformers 5 looks every attention function up by the name that the configuration holds, with the modelling file's own
eager function as the default. While a watch is entered, what that look-up finds runs as it is, and then tells the
watchers of its arguments; the names in configurations stay as they are.

Fused functions return no probabilities, and families differ in what they do to the scores: masks, windows, soft caps,
position biases, learnt sinks. So nothing is computed a second way here. The function itself is asked, with values that
are 1 at one key and 0 at all others: what it then puts out is the probability of that key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ENTRIES = 1 << 25
"""Scores (batch x heads x queries x keys) that are asked for at once: 128 MiB in float32."""

_EXACT = ("eager", "sdpa")
"""Implementations that run in any type; kernels take the type that they were written for."""


@dataclass
class AttentionCall:
    """One call of an attention function, after it has run.

    Attributes:
        module: the attention module.
        implementation: name of the function, as transformers names it.
        function: the function itself.
        query: (batch, heads, queries, width).
        key: (batch, key heads, keys, width); what a cache holds, and the new ones at the end.
        value: (batch, key heads, keys, value width).
        mask: what says which keys a query sees, as the function takes it; None where the function knows by itself.
        options: named arguments of the call.
    """

    module: nn.Module
    implementation: str
    function: Callable[..., Any]
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any] = field(default_factory=dict)


Watcher = Callable[[AttentionCall], None]

_watchers: list[Watcher] = []
_before: list[Callable[..., Any]] = []


@contextmanager
def watched_attention(see: Watcher) -> Iterator[None]:
    """While entered, ``see(call)`` is told of each call of an attention function of any model, after it has run.

    What the function returned is handed on untouched. Watches may stand inside each other.
    """
    from transformers import modeling_utils

    interface: Any = modeling_utils.AttentionInterface
    if not _watchers:
        _before.append(interface.get_interface)
        interface.get_interface = _look_up(_before[-1])
    _watchers.append(see)
    try:
        yield
    finally:
        _watchers.remove(see)
        if not _watchers:
            interface.get_interface = _before.pop()


def _look_up(before: Callable[..., Any]) -> Callable[..., Any]:
    def get_interface(registry: Any, implementation: Any, default: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_run, str(implementation), before(registry, implementation, default))

    return get_interface


@torch.compiler.disable
def _run(implementation: str, function: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    result = function(module, *args, **kwargs)
    if len(args) >= 3:
        options = dict(kwargs)
        query, key, value, *rest = args
        mask = rest[0] if rest else options.pop("attention_mask", None)
        with torch.no_grad():
            for see in list(_watchers):
                see(AttentionCall(module, implementation, function, query, key, value, mask, options))
    return result


def sink_probability(call: AttentionCall, column: Tensor) -> Tensor:
    """(batch, queries, heads) float32 attention probability of one key per row of the batch.

    In float32 whatever the model's type, where the function can; kernels answer in the model's type.

    Args:
        call: a call of an attention function.
        column: (batch,) place of the key among the keys; below 0: it is not among them any more, its probability is 0.
    """
    column = column.to(call.key.device)
    here = (column >= 0).nonzero()[:, 0]
    answer = torch.zeros_like(call.value)
    answer[here, :, column[here], 0] = 1.0
    options = {name: value for name, value in call.options.items() if name != "dropout"}
    query, key, mask = call.query, call.key, call.mask
    if call.implementation.removeprefix("paged|") in _EXACT:
        query, key, answer = query.float(), key.float(), answer.float()
        mask = mask.float() if isinstance(mask, Tensor) and mask.is_floating_point() else mask
    parts = []
    for queries in _chunks(call):
        part = mask if queries is None else mask[:, :, queries]
        asked = query if queries is None else query[:, :, queries]
        parts.append(call.function(call.module, asked, key, answer, part, dropout=0.0, **options)[0][..., 0])
    return torch.cat(parts, 1).float().nan_to_num_(nan=0.0)


def _chunks(call: AttentionCall) -> list[slice | None]:
    """The queries in parts of bounded memory; in one where the function may look at more than its own mask's row."""
    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[2]
    size = max(1, ENTRIES // (batch * heads * keys))
    mask = call.mask
    by_query = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == queries
    others = [name for name, value in call.options.items() if isinstance(value, Tensor) and value.ndim > 1]
    if size >= queries or not by_query or set(others) - {"position_ids"}:
        return [None]
    return [slice(start, start + size) for start in range(0, queries, size)]
