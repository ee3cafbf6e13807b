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
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from compressor.families import FUSED, Adapter, ExpertsLayout, Routed, Selection, adapter_of, is_fused_experts
from moescope.errors import CaptureError

ExpertsFunction = Callable[..., Tensor]


@dataclass
class ExpertsCall:
    """One call of one experts module. What was selected is known once it has run: some modules hold their router.

    Attributes:
        module: the experts module.
        backend: name of the function that runs it, as transformers names it; ``own`` outside its interface.
        function: that function; ``function(module, *args, **kwargs)`` is what the model would have done.
        args: positional arguments of the call.
        kwargs: named arguments of the call.
        adapter: how the call is to be read.
        last_routed: gives what the router said last; None where no router was seen.
        result: what the module returned, once it has run.
    """

    module: nn.Module
    backend: str
    function: ExpertsFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    adapter: Adapter = FUSED
    last_routed: Callable[[], Routed | None] = lambda: None
    result: Any = None

    def run(self, module: Any = None) -> Any:
        """Run the experts, on a stand-in for the module where one is given."""
        self.result = self.function(self.module if module is None else module, *self.args, **self.kwargs)
        return self.result

    @property
    def routed(self) -> Routed | None:
        """What the router said last; some routers run inside the module that is called."""
        return self.last_routed()

    @cached_property
    def selection(self) -> Selection:
        """Whom the tokens went to; read after the run.

        Raises:
            CaptureError: the adapter cannot read the call, or reads something that is no selection.
        """
        return _read(self)

    @property
    def hidden(self) -> Tensor:
        """(tokens, width) the experts' inputs x, before any gate weight."""
        return self.selection.hidden

    @property
    def ids(self) -> Tensor:
        """(tokens, k) selected experts."""
        return self.selection.ids

    @property
    def weights(self) -> Tensor:
        """(tokens, k) gate weights, wherever the model applies them."""
        return self.selection.weights

    @property
    def output_weights(self) -> Tensor:
        """(tokens, k) by what the experts' outputs are multiplied in their sum: 1 where the inputs were weighted."""
        weights = self.weights
        return torch.ones_like(weights) * (self.ids >= 0) if self.adapter.weights_input else weights

    def inputs_of(self, token: Tensor, gate: Tensor) -> Tensor:
        """(rows, width) what an expert is given, row by row: tokens, and their gate weights for it."""
        inputs = self.hidden.detach()[token]
        return inputs * gate.detach()[:, None].to(inputs.dtype) if self.adapter.weights_input else inputs

    @cached_property
    def output(self) -> Tensor:
        """(tokens, hidden) the experts' weighted sum; read after the run."""
        return self.adapter.output(self)


def _read(call: ExpertsCall) -> Selection:
    """Adapters are written by users: what goes wrong in one is said in one line."""
    if call.adapter is FUSED:
        return call.adapter.read(call)
    name = type(call.module).__name__
    try:
        selection = call.adapter.read(call)
        hidden, ids, weights = (tuple(part.shape) for part in (selection.hidden, selection.ids, selection.weights))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(f"the adapter of {name} cannot read a call: {type(error).__name__}: {error}") from error
    if len(hidden) != 2 or len(ids) != 2 or ids != weights or ids[0] != hidden[0]:
        raise CaptureError(
            f"the adapter of {name} reads hidden {hidden}, ids {ids} and weights {weights}: (tokens, width) and twice"
            " (tokens, k) are wanted"
        )
    return selection


Watcher = Callable[[ExpertsCall], Any]

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
    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = function if function is not None else _own_forward(module)
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


def _own_forward(module: nn.Module) -> ExpertsFunction:
    """The forward that the library decorated; FP8 experts are decorated once more for every layer."""
    forward: Any = type(module).forward
    dispatcher = forward.__code__
    while forward.__code__ is dispatcher:
        forward = forward.__wrapped__
    return cast(ExpertsFunction, forward)


def _shadow(module: nn.Module) -> Callable[[], None]:
    """Put the tap before the forward of a module outside the interface; returns what takes it off again."""
    adapter = adapter_of(module)
    name = adapter.method if adapter is not None else "forward"
    before = module.__dict__.get(name, _ABSENT)
    own = getattr(module, name)
    module.__dict__[name] = partial(_wrap("own", lambda _, *args, **kwargs: own(*args, **kwargs)), module)

    def restore() -> None:
        if before is _ABSENT:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before

    return restore


@dataclass
class TappedRows:
    """What happened inside the experts, one row per selection, sorted by expert.

    Attributes:
        expert: (rows,) expert of each row, ascending.
        token: (rows,) index of its token in the call.
        gate: (rows,) weight of the row in the experts' sum.
        activation: (rows, I) what entered the second projection; None where a kernel keeps it to itself.
        output: (rows, hidden) what came out of it, before the gate weight.
        order: (rows,) place of each row among the selections, token by token.
        live: ``activation`` as part of a graph, where the forward runs with gradients.
        live_order: (rows,) place of each row in ``live``; None where rows stand alike.
    """

    expert: Tensor
    token: Tensor
    gate: Tensor
    activation: Tensor | None
    output: Tensor
    order: Tensor
    live: Tensor | None = None
    live_order: Tensor | None = None

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


def run_with_rows(call: ExpertsCall, layout: ExpertsLayout) -> TappedRows:
    """Run the experts and see inside; what they return is what the model would have had, bit for bit.

    Where the backend does not let the rows be seen (the eager loop, fused kernels, another version of the library), the
    experts run as they are and the rows are computed again, expert by expert.
    """
    stand_in = _StandIn(call.module)
    seen = call.backend in ("grouped_mm", "batched_mm")
    call.run(stand_in if seen else None)
    with torch.no_grad():
        if stand_in.output is None or stand_in.activation is None:
            return _computed_rows(call, layout)
        return _seen_rows(call, stand_in)


def run_packed(call: ExpertsCall) -> TappedRows:
    """Run experts with packed weights, and once more with every (token, expert) as a token of its own.

    With one expert per token and weight 1, what the module returns is what single experts put out. The model gets the
    first answer. What enters the second projection is seen where the backend asks the module for its gate (FP8).
    """
    stand_in = _StandIn(call.module)
    call.run(stand_in if call.backend in ("grouped_mm", "batched_mm") else None)
    with torch.no_grad():
        ids, weights, hidden = call.ids, call.weights.detach(), call.hidden.detach()
        k, ones = ids.shape[-1], torch.ones_like(weights).reshape(-1, 1)
        output = call.module.forward(hidden.repeat_interleave(k, 0), ids.reshape(-1, 1), ones)
        expert, order = torch.sort(ids.reshape(-1))
        activation = stand_in.activation
        if activation is not None and call.backend == "batched_mm":
            activation = activation[order]
        return TappedRows(expert, order // k, weights.reshape(-1)[order], activation, output[order], order)


def _seen_rows(call: ExpertsCall, stand_in: _StandIn) -> TappedRows:
    # The library sorts the selections in the same way, so the same sort names its rows.
    expert, order = torch.sort(call.ids.reshape(-1))
    gate = call.weights.detach().reshape(-1)[order]
    activation, output = stand_in.activation.detach(), stand_in.output.detach()
    live = stand_in.activation if stand_in.activation.requires_grad else None
    token, live_order = order // call.ids.shape[-1], None
    if call.backend == "batched_mm":  # rows come token by token
        activation, output, live_order = activation[order], output[order], order
    return TappedRows(expert, token, gate, activation, output, order, live, live_order)


def _computed_rows(call: ExpertsCall, layout: ExpertsLayout) -> TappedRows:
    expert, order = torch.sort(call.ids.reshape(-1))
    token = order // call.ids.shape[-1]
    weight = call.weights.detach().reshape(-1)[order]
    activation = call.hidden.new_zeros(len(token), layout.width)
    output = call.hidden.new_zeros(len(token), layout.hidden_size)
    numbers, counts = torch.unique_consecutive(expert, return_counts=True)
    start = 0
    for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        rows = slice(start, start := start + count)
        if 0 <= number < layout.num_experts:
            inputs = call.inputs_of(token[rows], weight[rows])
            activation[rows], output[rows] = layout.run_expert(call.module, number, inputs)
    gate = call.output_weights.detach().reshape(-1)[order]
    return TappedRows(expert, token, gate, activation, output, order)


def recompute(call: ExpertsCall, layout: ExpertsLayout, chosen: Tensor) -> Tensor:
    """(chosen, hidden) output for some tokens by plain per-expert products in float32, to check the model's."""
    ids, weights, gates = call.ids[chosen], call.weights[chosen], call.output_weights[chosen]
    total = call.hidden.new_zeros(len(ids), layout.hidden_size, dtype=torch.float32)
    for expert in torch.unique(ids).tolist():
        if not 0 <= expert < layout.num_experts:
            continue
        token, slot = torch.where(ids == expert)
        inputs = call.inputs_of(chosen[token], weights[token, slot]).float()
        _, output = layout.run_expert(call.module, expert, inputs)
        total.index_add_(0, token, output * gates[token, slot, None].float())
    return total
