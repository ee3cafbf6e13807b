"""Hooks and taps on a model: they follow each forward, and hand what it showed on when it has ended well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.families import Routed, find_router_outputs
from moescope.errors import CaptureError
from profiler.capture.batch import ExpertRows, ResidualBatch
from profiler.capture.blocks import block_of, fitting_logits, real_rows, run_inside
from profiler.capture.discovery import MoELayer, MoEModel
from profiler.capture.engine import capturing_graph
from profiler.capture.frame import Frame, modules_beside
from profiler.capture.hooks import Hooks
from profiler.capture.inputs import (
    OUTER_ARGUMENTS,
    modules_around,
    read_argument,
    read_hidden,
    read_inputs,
    takes_text,
)
from profiler.capture.recording import Recording
from profiler.capture.routing import LayerRouting
from profiler.capture.sequences import SequenceTracker
from profiler.capture.shared import watch_shared
from profiler.capture.tap import ExpertsCall, TappedRows, tapped


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
        holds: whether a forward that ends waits for what comes after it, see :meth:`holding`.
        model: the model as the user calls it.
        found: the MoE layers.
        running: the decoder layer that runs, where they run one at a time; None where all run.
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
        self.model, self.found = model, found
        self._recording, self._tracker, self._ended = recording, tracker, ended
        self.frame: Frame | None = None
        self.running: int | None = None
        self._outer: dict[str, Any] = {}
        self.active = self.whole = True
        self.holds = False
        self._held: tuple[Frame, list[Any]] | None = None

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

    @contextmanager
    def holding(self) -> Iterator[None]:
        """While entered, a forward that ends waits: it counts together with what came after it, or not at all."""
        self.holds, self._held = True, None
        try:
            yield
        except BaseException:
            if self._held is not None:
                self._failed()
            raise
        finally:
            held, self._held, self.holds = self._held, None, False
        if held is not None:
            self._count(*held)

    def _add_hooks(self, hooks: Hooks) -> None:
        # The encoder and the decoder of one model have masks of their own; theirs are in the arguments of the owner.
        both = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        for module in [] if both else modules_around(self.model, self.found.owner):
            hooks.before(module, self._saw_outer)
        hooks.before(self.found.owner if takes_text(self.found.owner) else self.found.stack[0], self._open)
        hooks.after(self.found.owner, self._close, always=True)
        for layer in self.found.layers:
            for router in layer.routers:
                hooks.after(router, self._router_hook(layer), first=True)
            if self._recording.sees_rows:
                watch_shared(layer, hooks, self._take_shared)
        if self._recording.sees_norms:
            for module in modules_beside(self.found):
                hooks.after(module, self._saw_module, first=True)
        if self._recording.sees_residual:
            for index, module in enumerate(self.found.stack):
                if self.running in (None, index):
                    hooks.after(module, self._residual_hook(index), first=True)

    # The frame of a forward

    def _saw_outer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in OUTER_ARGUMENTS:
            value = read_argument(module, name, args, kwargs)
            if value is not None:
                self._outer[name] = value

    @torch.no_grad()
    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            return
        if capturing_graph():
            self._tracker.findings["graph capture"] += 1
            return
        if self.frame is not None:
            if self.frame.thread != threading.get_ident():
                raise CaptureError("two forwards of the watched model run at once: profile with one worker and thread")
            self._failed()  # an interrupt from the keyboard ended it without a word
        whole = module is self.found.owner
        inputs = read_inputs(module, args, kwargs, self._outer) if whole else read_hidden(args, kwargs, self._outer)
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
        caches = [forward.inputs.cache, getattr(output, "past_key_values", None)]
        if self.holds:
            self._held = (forward, caches)
        else:
            self._count(forward, caches)

    @torch.no_grad()
    def _count(self, forward: Frame, caches: list[Any]) -> None:
        """Take a forward that has ended well into the sums."""
        seconds = time.perf_counter() - forward.began
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
                self.frame.routed[layer.key] = Routed(module, args[0] if args else None, output)

        return see

    def _saw_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.frame is not None and args:
            self.frame.saw_module(module, output, args[0])

    def _watcher(self, layer: MoELayer) -> Callable[[ExpertsCall], Any]:
        def run(call: ExpertsCall) -> Any:
            forward, call.adapter = self.frame, layer.adapter
            if forward is None:
                self._tracker.findings["outside a forward"] += int(self.active)
                return call.run()
            call.last_routed = lambda: forward.routed.get(layer.key)
            rows = run_inside(call, layer) if self._recording.sees_rows else call.run()
            with torch.no_grad():
                self._take(forward, layer, call, rows if self._recording.sees_rows else None)
            return call.result

        return run

    def _take(self, forward: Frame, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None) -> None:
        ids, weights = call.ids.detach(), call.weights.detach()
        tokens = forward.tokens_of(layer, ids.shape[0])
        if tokens is None:
            self._tracker.findings["rows unlike tokens"] += 1
            return
        times, base = forward.calls[layer.key], layer.key
        forward.calls[base] += 1
        layer = layer.called(times)
        logits = None
        routed = forward.routed.pop(base, None)  # a later call that asks no router has no logits of its own
        if routed is None and layer.adapter.method != "forward" and layer.router is not None:
            # The block asked a kernel instead of its router, which is asked now: past its hooks, for the scores alone.
            answer = layer.router.forward(call.hidden)
            logits, _ = find_router_outputs(answer, logits_index=layer.logits_index, top_k=layer.top_k)
        if routed is not None:
            found = find_router_outputs(routed.output, logits_index=layer.logits_index, top_k=layer.top_k)
            forward.chosen[layer.key], logits = found, found[0]
        logits = fitting_logits(logits, ids.shape[0], layer)
        part = None if tokens is forward.tokens else tokens
        forward.routing[layer.key] = LayerRouting(layer, ids, weights, logits, part)
        if forward.sampled:
            seen = forward if part is None else replace(forward, tokens=part)
            self._recording.checks.compare(seen, layer, call, call.output, rows)
        block = None if rows is None else block_of(forward, tokens, layer, call, rows)
        if rows is not None and block is not None:
            self._recording.add_block(layer, block, real_rows(block, layer, call, rows))
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
        live = activation if activation is not None and activation.requires_grad else None
        flat = None if activation is None else activation.detach().reshape(-1, activation.shape[-1])
        self._recording.add_rows(
            ExpertRows(layer.key, "shared", 1, tokens, expert, token, weight, flat, output, keep, None, inputs, live)
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
