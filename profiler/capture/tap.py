"""Stand in the library's experts interface: see what an experts module gets, does and returns, and change nothing.

transformers 5 dispatches every fused experts module through a registry of functions (grouped_mm, batched_mm, eager,
...) by the name that the module's configuration holds at that moment. While a tap is installed, each function of the
registry is wrapped. The names stay as they are, so configurations, their per-layer copies and the change of backend
that ``generate`` makes for decoding are all left alone; modules that nobody watches pass straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressor.families import ExpertsLayout, is_fused_experts
from moescope.errors import CaptureError

ExpertsFunction = Callable[..., Tensor]


@dataclass
class ExpertsCall:
    """One call of one experts module, before it has run.

    Attributes:
        module: the experts module.
        backend: name of the function that runs it, as transformers names it; ``own`` outside its interface.
        function: that function; ``function(module, *args, **kwargs)`` is what the model would have done.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
    """

    module: nn.Module
    backend: str
    function: ExpertsFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        # Some families call by position, GPT-OSS by its own names; the order is the same everywhere.
        hidden, self.ids, self.weights = (*self.args, *self.kwargs.values())[:3]
        self.hidden: Tensor = hidden.reshape(-1, hidden.shape[-1])

    def run(self, module: Any = None) -> Tensor:
        """Run the experts, on a stand-in for the module where one is given."""
        return self.function(self.module if module is None else module, *self.args, **self.kwargs)


Watcher = Callable[[ExpertsCall], Tensor]

_watchers: dict[int, Watcher] = {}
_running: set[int] = set()
_installed: list[tuple[Any, dict[Any, Any]]] = []


@contextmanager
def tapped(watchers: Sequence[tuple[nn.Module, Watcher]]) -> Iterator[None]:
    """While entered, each call of the given experts modules goes to its watcher, which returns the output.

    Raises:
        CaptureError: one of the modules is being watched already.
    """
    for module, _ in watchers:
        if id(module) in _watchers:
            raise CaptureError("this model is being watched already: leave the first watch() before the second")
    if not _watchers:
        _install()
    _watchers.update({id(module): watcher for module, watcher in watchers})
    shadowed = [_shadow(module) for module, _ in watchers if not is_fused_experts(module)]
    try:
        yield
    finally:
        for restore in shadowed:
            restore()
        for module, _ in watchers:
            _watchers.pop(id(module), None)
        if not _watchers:
            _uninstall()


def _install() -> None:
    for registry in _registries():
        names = [*registry, "eager", None]  # "eager" is in no registry: there the class's own loop runs
        before = {name: registry._local_mapping.get(name, _ABSENT) for name in names}
        wrapped = {name: _wrap(str(name or "eager"), registry.get(name)) for name in names}
        registry._local_mapping.update(wrapped)
        _installed.append((registry, before))


def _uninstall() -> None:
    while _installed:
        registry, before = _installed.pop()
        for name, function in before.items():
            if function is _ABSENT:
                registry._local_mapping.pop(name, None)
            else:
                registry._local_mapping[name] = function


_ABSENT = object()


def _registries() -> list[Any]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    registries = [ALL_EXPERTS_FUNCTIONS]
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return registries
    return [*registries, ALL_FP8_EXPERTS_FUNCTIONS]


def _wrap(backend: str, function: ExpertsFunction | None) -> ExpertsFunction:
    @torch.compiler.disable
    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        run = function if function is not None else type(module).forward.__wrapped__  # type: ignore[attr-defined]
        # A backend may hand on to another one of the registry: the call is one and the same.
        watcher = None if id(module) in _running else _watchers.get(id(module))
        if watcher is None:
            return run(module, *args, **kwargs)
        _running.add(id(module))
        try:
            return watcher(ExpertsCall(module, backend, run, args, kwargs))
        finally:
            _running.discard(id(module))

    return cast(ExpertsFunction, watched)


def _shadow(module: nn.Module) -> Callable[[], None]:
    """Put the tap before the forward of a module outside the interface; returns what takes it off again."""
    before = module.__dict__.get("forward", _ABSENT)
    own = module.forward
    module.__dict__["forward"] = partial(_wrap("own", lambda _, *args, **kwargs: own(*args, **kwargs)), module)

    def restore() -> None:
        if before is _ABSENT:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    return restore


@dataclass
class TappedRows:
    """What happened inside the experts, one row per selection, sorted by expert.

    Attributes:
        expert: (rows,) expert of each row, ascending.
        token: (rows,) index of its token in the call.
        gate: (rows,) gate weight.
        activation: (rows, I) what entered the second projection.
        output: (rows, hidden) what came out of it, before the gate weight.
        order: (rows,) place of each row among the selections, token by token.
        live: ``activation`` with its graph, where the forward runs with gradients, in the backend's own order of rows.
    """

    expert: Tensor
    token: Tensor
    gate: Tensor
    activation: Tensor
    output: Tensor
    order: Tensor
    live: Tensor | None = None

    def slots(self, k: int) -> Tensor:
        """(tokens, k) the row of each selection."""
        return torch.argsort(self.order).view(-1, k)


class _StandIn:
    """Looks like the experts module to the library's function, and keeps what passes its gate and its output norm."""

    has_post_expert_norm = True

    def __init__(self, module: nn.Module) -> None:
        self.__dict__.update(_module=module, activation=None, output=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, inner: Tensor) -> Tensor:
        gated: Tensor = self._module._apply_gate(inner)
        self.__dict__["activation"] = gated
        return gated

    def act_fn(self, inner: Tensor) -> Tensor:
        # Reached from the library's function only where there is no gate; a family's own gate asks its own module.
        active: Tensor = self._module.act_fn(inner)
        self.__dict__["activation"] = active
        return active

    def post_expert_norm(self, output: Tensor) -> Tensor:
        if self._module.has_post_expert_norm:
            output = self._module.post_expert_norm(output)
        self.__dict__["output"] = output
        return output


def run_with_rows(call: ExpertsCall, layout: ExpertsLayout) -> tuple[Tensor, TappedRows]:
    """Run the experts and see inside; the output is the one that the model would have had, bit for bit.

    Where the backend does not let the rows be seen (the eager loop, fused kernels, another version of the library), the
    experts run as they are and the rows are computed again, expert by expert.
    """
    stand_in = _StandIn(call.module)
    seen = call.backend in ("grouped_mm", "batched_mm")
    output = call.run(stand_in if seen else None)
    with torch.no_grad():
        if stand_in.output is None or stand_in.activation is None:
            return output, _computed_rows(call, layout)
        return output, _seen_rows(call, stand_in)


def _seen_rows(call: ExpertsCall, stand_in: _StandIn) -> TappedRows:
    # The library sorts the selections in the same way, so the same sort names its rows.
    expert, order = torch.sort(call.ids.reshape(-1))
    gate = call.weights.detach().reshape(-1)[order]
    activation, output = stand_in.activation.detach(), stand_in.output.detach()
    if call.backend == "batched_mm":  # rows come token by token
        activation, output = activation[order], output[order]
    live = stand_in.activation if stand_in.activation.requires_grad else None
    return TappedRows(expert, order // call.ids.shape[-1], gate, activation, output, order, live)


def _computed_rows(call: ExpertsCall, layout: ExpertsLayout) -> TappedRows:
    expert, order = torch.sort(call.ids.reshape(-1))
    token = order // call.ids.shape[-1]
    hidden = call.hidden.detach()
    activation = hidden.new_zeros(len(token), layout.width)
    output = hidden.new_zeros(len(token), layout.hidden_size)
    numbers, counts = torch.unique_consecutive(expert, return_counts=True)
    start = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        rows = slice(start, start := start + count)
        if 0 <= number < layout.num_experts:
            activation[rows], output[rows] = layout.run_expert(call.module, number, hidden[token[rows]])
    return TappedRows(expert, token, call.weights.detach().reshape(-1)[order], activation, output, order)


def recompute(call: ExpertsCall, layout: ExpertsLayout, tokens: int) -> Tensor:
    """(tokens, hidden) output for the first tokens by plain per-expert products in float32, to check the model's."""
    hidden, ids, weights = call.hidden[:tokens].detach().float(), call.ids[:tokens], call.weights[:tokens]
    total = torch.zeros_like(hidden)
    for expert in torch.unique(ids).tolist():
        if not 0 <= expert < layout.num_experts:
            continue
        token, slot = torch.where(ids == expert)
        _, output = layout.run_expert(call.module, expert, hidden[token])
        total.index_add_(0, token, output * weights[token, slot, None].float())
    return total
