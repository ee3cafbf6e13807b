"""Hooks and taps on a model: they follow each forward, and hand what it showed on when it has ended well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.families import find_router_outputs
from moescope.errors import CaptureError
from profiler.capture.batch import BlockBatch, ExpertRows, ResidualBatch
from profiler.capture.discovery import MoELayer, MoEModel
from profiler.capture.frame import Frame
from profiler.capture.hooks import Hooks
from profiler.capture.inputs import modules_around, read_argument, read_inputs
from profiler.capture.recording import Recording
from profiler.capture.routing import LayerRouting
from profiler.capture.sequences import SequenceTracker
from profiler.capture.shared import watch_shared
from profiler.capture.tap import ExpertsCall, TappedRows, run_with_rows, tapped


class Observer:
    """Follows the forwards of one model.

    Args:
        model: the model as the user calls it.
        found: its MoE layers.
        recording: where everything goes.
        tracker: knows whose tokens a forward has.
        ended: called after each forward that ended well, with its real tokens and its seconds.

    Attributes:
        active: False lets forwards pass without a look.
        whole: False while a forward is being added: an interrupt then leaves some recorders with it and some without.
        frame: the forward that is running, None between forwards.
        found: the MoE layers.
    """

    def __init__(
        self,
        model: nn.Module,
        found: MoEModel,
        *,
        recording: Recording,
        tracker: SequenceTracker,
        ended: Callable[[int, float], None],
    ) -> None:
        self._model, self.found = model, found
        self._recording, self._tracker, self._ended = recording, tracker, ended
        self.frame: Frame | None = None
        self._outer: dict[str, Any] = {}
        self.active = self.whole = True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While entered, the model is watched; hooks and taps are gone afterwards, also after an error."""
        stack, hooks = ExitStack(), Hooks()
        try:
            # Hooks on a compiled model are ignored without a word, so it runs as it is written for the while.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(tapped([(layer.experts, self._watcher(layer)) for layer in self.found.layers]))
            self._add_hooks(hooks)
            for probe in self._recording.probes:
                probe.attach(self, hooks, stack)
            yield
        finally:
            hooks.remove()
            stack.close()
            self.frame, self._outer = None, {}

    def _add_hooks(self, hooks: Hooks) -> None:
        for module in modules_around(self._model, self.found.owner):
            hooks.before(module, self._saw_outer)
        hooks.before(self.found.owner, self._open)
        hooks.after(self.found.owner, self._close, always=True)
        for layer in self.found.layers:
            if layer.router is not None:
                hooks.after(layer.router, self._router_hook(layer), first=True)
            if self._recording.sees_rows:
                watch_shared(layer, hooks, self._take_shared)
        if self._recording.sees_rows:
            for module in _between(self.found):
                hooks.after(module, self._saw_module, first=True)
        if self._recording.sees_residual:
            for index, module in enumerate(self.found.stack):
                hooks.after(module, self._residual_hook(index), first=True)

    # The frame of a forward

    def _saw_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in ("input_ids", "attention_mask"):
            value = read_argument(module, name, args, kwargs)
            if value is not None:
                self._outer[name] = value

    @torch.no_grad()
    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            return
        if self.frame is not None:
            if self.frame.thread != threading.get_ident():
                raise CaptureError("two forwards of the watched model run at once: profile with one worker and thread")
            self._failed()  # an interrupt from the keyboard ended it without a word
        inputs = read_inputs(module, args, kwargs, self._outer)
        self._outer = {}
        tokens, rows = self._tracker.begin(inputs)
        sampled = self._recording.checks.wants_sample()
        self.frame = Frame(inputs, tokens, rows, sampled)

    @torch.no_grad()
    def _close(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self.frame
        if forward is None or forward.thread != threading.get_ident():
            return
        self.frame = None
        if output is None:
            self._failed()
            return
        seconds = time.perf_counter() - forward.began
        caches = [forward.inputs.cache, getattr(output, "past_key_values", None)]
        self.whole = False
        self._tracker.commit(forward.tokens, forward.rows, forward.inputs, caches)
        self._recording.commit(forward.tokens, forward.routing, forward.inputs.input_ids)
        self.whole = True
        self._ended(len(forward.tokens), seconds)

    def _failed(self) -> None:
        self.frame = None
        self._tracker.abort()
        self._recording.discard()

    # What happens in a layer

    def _router_hook(self, layer: MoELayer) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.frame is not None:
                found = find_router_outputs(output, logits_index=layer.logits_index, top_k=layer.top_k)
                self.frame.chosen[layer.key] = found

        return see

    def _saw_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.frame is not None and args:
            self.frame.saw_module(output, args[0])

    def _watcher(self, layer: MoELayer) -> Callable[[ExpertsCall], Tensor]:
        def run(call: ExpertsCall) -> Tensor:
            forward = self.frame
            if forward is None:
                self._tracker.findings["outside a forward"] += int(self.active)
                return call.run()
            output, rows = _run(call, layer) if self._recording.sees_rows else (call.run(), None)
            with torch.no_grad():
                self._take(forward, layer, call, output, rows)
            return output

        return run

    def _take(
        self, forward: Frame, layer: MoELayer, call: ExpertsCall, output: Tensor, rows: TappedRows | None
    ) -> None:
        if layer.key in forward.routing:
            raise CaptureError(f"{layer.name} was called twice in one forward: such a model needs an adapter")
        ids, weights = call.ids.detach(), call.weights.detach()
        if ids.shape[0] != forward.tokens.rows:
            self._tracker.findings["rows unlike tokens"] += 1
            return
        logits, chosen = forward.chosen.get(layer.key, (None, None))
        logits = _fitting(logits, ids.shape[0], layer.num_experts)
        forward.routing[layer.key] = LayerRouting(layer, ids, weights, logits)
        if forward.sampled:
            self._recording.checks.compare(layer, call, output, rows)
            if chosen is not None and chosen.numel() == ids.numel():
                self._recording.checks.compare_selection(layer, chosen, ids)
        if rows is not None:
            block = _block(forward, layer, call, output, rows)
            self._recording.add_block(layer, block, _real_rows(block, layer, rows))
            for probe in self._recording.probes:
                probe.saw_experts(layer, call, rows, block)

    def _take_shared(
        self, layer: MoELayer, inputs: Tensor | None, gate: Tensor | None, activation: Tensor | None, output: Tensor
    ) -> None:
        forward = self.frame
        if forward is None or output.shape[0] != forward.tokens.rows:
            return
        tokens, device = forward.tokens, output.device
        keep = None if tokens.keep is None else tokens.keep.to(device)
        token = torch.arange(len(tokens), device=device)
        weight = torch.ones(output.shape[0], device=device) if gate is None else gate.float()
        weight = weight if keep is None else weight[keep]
        expert = torch.zeros_like(token)
        self._recording.add_rows(
            ExpertRows(layer.key, "shared", 1, tokens, expert, token, weight, activation, output, keep, inputs=inputs)
        )

    def _residual_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            forward = self.frame
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if forward is None or not isinstance(hidden, Tensor) or hidden.numel() % forward.tokens.rows:
                return
            with torch.no_grad():
                flat = hidden.detach().reshape(forward.tokens.rows, -1)
                entered = args[0].detach() if args and isinstance(args[0], Tensor) else None
                entered = entered.reshape(flat.shape) if entered is not None and entered.shape == hidden.shape else None
                batch = ResidualBatch(index, forward.tokens, flat, hidden.shape[-1], entered)
                self._recording.add_residual(batch)

        return see


def _run(call: ExpertsCall, layer: MoELayer) -> tuple[Tensor, TappedRows]:
    assert layer.layout is not None, "refused before the run began"
    return run_with_rows(call, layer.layout)


def _fitting(logits: Tensor | None, rows: int, num_experts: int) -> Tensor | None:
    """(rows, classes) the logits, if there is one row per token and at least one class per expert."""
    if logits is None:
        return None
    flat = logits.detach().reshape(-1, logits.shape[-1])
    return flat if flat.shape[0] == rows and flat.shape[1] >= num_experts else None


def _block(frame: Frame, layer: MoELayer, call: ExpertsCall, output: Tensor, rows: TappedRows) -> BlockBatch:
    ids, weights = call.ids.detach(), call.weights.detach().float()
    none = (ids < 0) | (ids >= layer.num_experts)
    if layer.traits.zero_weight_is_none:
        none |= weights == 0
    hidden = call.hidden.detach()
    return BlockBatch(
        key=layer.key,
        num_experts=layer.num_experts,
        tokens=frame.tokens,
        hidden=hidden,
        ids=torch.where(none, -1, ids),
        weights=torch.where(none, 0, weights),
        output=output.detach().reshape(-1, output.shape[-1]),
        residual=frame.residual_before(hidden),
        slots=rows.slots(ids.shape[-1]),
        outputs=rows.output,
    )


def _real_rows(block: BlockBatch, layer: MoELayer, rows: TappedRows) -> ExpertRows:
    """The rows of a layer without those of padding, and without those that mean "no expert"."""
    tokens, expert, token, gate, real = block.tokens, rows.expert, rows.token, rows.gate.float(), None
    skips = layer.traits.zero_weight_is_none
    if tokens.keep is not None:
        place = torch.full((tokens.rows,), -1, device=token.device)
        place[tokens.keep.to(token.device)] = torch.arange(len(tokens), device=token.device)
        token = place[token]
    if tokens.keep is not None or skips:
        wanted = (token >= 0) & (gate != 0) if skips else token >= 0
        real = wanted.nonzero()[:, 0]
        expert, token, gate = expert[real], token[real], gate[real]
    return ExpertRows(
        layer.key,
        "routed",
        layer.num_experts,
        tokens,
        expert,
        token,
        gate,
        rows.activation,
        rows.output,
        real,
        block,
        block.hidden,
    )


def _between(found: MoEModel) -> list[nn.Module]:
    """The modules directly in the decoder layers of MoE layers that do not hold experts or routers: norms are there."""
    between = []
    for index in sorted({layer.layer for layer in found.layers}):
        inside = {id(layer.experts) for layer in found.layers} | {id(layer.router) for layer in found.layers}
        for child in found.stack[index].children():
            if not any(id(module) in inside for module in child.modules()):
                between.append(child)
    return between
