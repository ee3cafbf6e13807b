"""Stand in the library's experts interface: see what an experts module gets, does and returns, and change nothing.

transformers 5 dispatches every fused experts module through a registry of functions (grouped_mm, batched_mm, eager, ...)
by the name that the module's configuration holds at that moment. While a tap is installed, each function of the registry
is wrapped. The names stay as they are, so configurations, their per-layer copies and the change of backend that
``generate`` makes for decoding are all left alone; modules that nobody watches pass straight through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.families import ExpertsLayout
from moescope.errors import CaptureError

ExpertsFunction = Callable[..., Tensor]


@dataclass
class ExpertsCall:
    """One call of one experts module, before it has run.

    Attributes:
        module: the experts module.
        backend: name of the function that runs it, as transformers names it.
        function: that function; ``function(module, hidden, ids, weights)`` is what the model would have done.
        hidden: (tokens, hidden) what enters the experts.
        ids: (tokens, k) selected experts.
        weights: (tokens, k) gate weights.
    """

    module: nn.Module
    backend: str
    function: ExpertsFunction
    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def run(self, module: Any = None) -> Tensor:
        """Run the experts, on a stand-in for the module where one is given."""
        return self.function(self.module if module is None else module, self.hidden, self.ids, self.weights)


Watcher = Callable[[ExpertsCall], Tensor]

_watchers: dict[int, Watcher] = {}
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
    try:
        yield
    finally:
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
        watcher = _watchers.get(id(module))
        if watcher is None:
            return run(module, *args, **kwargs)
        # Some families call by position, GPT-OSS by its own names; the order is the same everywhere.
        hidden, ids, weights = (*args, *kwargs.values())[:3]
        return watcher(ExpertsCall(module, backend, run, hidden, ids, weights))

    return watched


@dataclass
class TappedRows:
    """What happened inside the experts, one row per selection, sorted by expert.

    Attributes:
        expert: (rows,) expert of each row, ascending.
        token: (rows,) index of its token in the call.
        gate: (rows,) gate weight.
        activation: (rows, I) what entered the second projection.
        output: (rows, hidden) what came out of it, before the gate weight.
    """

    expert: Tensor
    token: Tensor
    gate: Tensor
    activation: Tensor
    output: Tensor


class _StandIn:
    """Looks like the experts module to the library's function, and keeps what passes its gate and its output norm."""

    has_post_expert_norm = True

    def __init__(self, module: nn.Module) -> None:
        self.__dict__.update(_module=module, activation=None, output=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _apply_gate(self, inner: Tensor) -> Tensor:
        self.__dict__["activation"] = gated = self._module._apply_gate(inner)
        return gated

    def act_fn(self, inner: Tensor) -> Tensor:
        # Reached from the library's function only where there is no gate; a family's own gate asks its own module.
        self.__dict__["activation"] = active = self._module.act_fn(inner)
        return active

    def post_expert_norm(self, output: Tensor) -> Tensor:
        if self._module.has_post_expert_norm:
            output = self._module.post_expert_norm(output)
        self.__dict__["output"] = output
        return output


def run_with_rows(call: ExpertsCall) -> tuple[Tensor, TappedRows]:
    """Run the experts and see inside; the output is the one that the model would have had, bit for bit.

    Where the backend does not let the rows be seen (the eager loop, fused kernels), the experts run as they are and the
    rows come from a second pass through ``grouped_mm``.

    Raises:
        CaptureError: the second pass does not show the rows either; use level routing.
    """
    stand_in = _StandIn(call.module)
    if call.backend not in ("grouped_mm", "batched_mm"):
        output = call.run()
        with torch.no_grad():
            second = ExpertsCall(call.module, "grouped_mm", _grouped(), call.hidden, call.ids, call.weights)
            second.run(stand_in)
            return output, _rows(second, stand_in)
    output = call.run(stand_in)
    with torch.no_grad():
        return output, _rows(call, stand_in)


def _grouped() -> ExpertsFunction:
    from transformers.integrations.moe import grouped_mm_experts_forward

    return grouped_mm_experts_forward


def _rows(call: ExpertsCall, stand_in: _StandIn) -> TappedRows:
    if stand_in.output is None or stand_in.activation is None:
        raise CaptureError(
            f"{type(call.module).__name__} did not show its experts' outputs through {call.backend}: this version of"
            " transformers differs; use level routing"
        )
    k = call.ids.shape[-1]
    # The library sorts the selections in the same way, so the same sort names its rows.
    expert, order = torch.sort(call.ids.reshape(-1))
    gate = call.weights.detach().reshape(-1)[order]
    activation, output = stand_in.activation.detach(), stand_in.output.detach()
    if call.backend == "batched_mm":  # rows come token by token
        activation, output = activation[order], output[order]
    return TappedRows(expert, order // k, gate, activation, output)


def recompute(call: ExpertsCall, layout: ExpertsLayout) -> Tensor:
    """(tokens, hidden) the experts' output by plain per-expert matrix products in float32, to check the model's own."""
    hidden = call.hidden.detach().float()
    total = torch.zeros_like(hidden)
    for expert in call.ids.unique().tolist():
        if not 0 <= expert < layout.num_experts:
            continue
        token, slot = torch.where(call.ids == expert)
        _, output = layout.run_expert(call.module, expert, hidden[token])
        total.index_add_(0, token, output * call.weights[token, slot, None].float())
    return total
