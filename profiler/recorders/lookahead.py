"""How well later routers can be foreseen from an earlier layer: table ``lookahead``.

The router of the MoE layer l + d, d = 1..3, is run on what layer l knows, before the model runs it on the real input:
``router`` gives it the input of layer l's router (Fate's gate input), ``residual`` the residual stream before layer l's
norm, through the norm of layer l + d. What it would choose is compared with what was chosen: what a prefetch of experts
gains from looking ahead, and from fetching k + 1, ... k + 8 experts instead of k.

The k predicted experts are those that the router itself returns, with its bias, groups and all. More candidates follow
in the order of its scores: of the logits, or of softmax or sigmoid plus the bias that counts for choosing only, where
there is one; limits by groups of experts do not bind them. A router that returns no choice is read by its scores alone.

Not predicted, and named in table ``check``: routers that are no module of their own, that are given whole sequences,
that take more than a token's hidden state (hash routers, states handed from layer to layer), that change when they run,
or that show no scores. Where no norm gives the router its input (Gemma 4's router norms for itself), there is no
``residual``. Position 0 stands apart: its hidden state is unlike all others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from profiler.capture.batch import BlockBatch, Group, LayerKey, Tokens
from profiler.capture.check_rows import CheckRow
from profiler.capture.discovery import MoELayer
from profiler.capture.frame import Frame
from profiler.capture.hooks import Hooks
from profiler.capture.router_call import RouterCall, other_inputs
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.base import columns_of, integer_lists
from profiler.recorders.staged import Staged

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

DISTANCES = (1, 2, 3)
KEPT = 6
"""Layers that are remembered: those of text and of image tokens may take turns."""

EXTRA = 8
"""Candidates beyond k whose hits are counted."""

SumKey = tuple[LayerKey, int, str, Group, bool]
"""((layer, step), distance, input, (domain, phase), first position)"""


@dataclass(frozen=True)
class _Known:
    """What an earlier layer knew of its tokens: its router's input, and the residual stream before its norm."""

    tokens: Tokens
    inputs: Tensor
    residual: Tensor | None


@dataclass(frozen=True)
class _Prediction:
    """(tokens, candidates) experts in the order in which they would be fetched, and (tokens,) cosine of the inputs."""

    distance: int
    source: str
    experts: Tensor
    cosine: Tensor


class LookaheadRecorder(Staged):
    """Runs later routers on earlier inputs and counts how much of the real choice they foresee."""

    needs_rows = False

    def __init__(self) -> None:
        super().__init__()
        self._observer: Observer | None = None
        self._frame: Frame | None = None
        self._known: list[_Known] = []
        self._predictions: dict[int, list[_Prediction]] = {}
        self._refused: dict[LayerKey, tuple[MoELayer, str]] = {}
        self._sound: set[int] = set()
        self._sums: dict[SumKey, NDArray[np.float64]] = {}

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Watch the routers."""
        self._observer = observer
        for layer in observer.found.layers:
            for router in layer.routers:
                hooks.before(router, self._router_hook(layer))
            if not layer.routers:
                self._refuse(layer, "its router is no module of its own")

    def _router_hook(self, layer: MoELayer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        @torch.no_grad()
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            frame = self._observer.frame if self._observer is not None else None
            if frame is None or not args or not isinstance(args[0], Tensor):
                return
            if self._frame is not frame:
                self._frame, self._known, self._predictions = frame, [], {}
            inputs: Tensor = args[0].detach()
            tokens = frame.tokens_of(layer, inputs.numel() // inputs.shape[-1])
            if tokens is None:
                self._refuse(layer, "its router is given other rows than the tokens")
                return
            norm = frame.norm_before(inputs)
            reason = other_inputs(args[1:], kwargs, frame)
            if reason:
                self._refuse(layer, reason)
            elif layer.key not in self._refused and len(tokens):
                router = RouterCall(layer, module, inputs, args[1:], kwargs, norm, tokens)
                self._predictions[id(module)] = list(self._predict(router))
            # Copies: what a layer was given may be overwritten before a later one asks.
            known = _Known(tokens, inputs.clone(), None if norm is None else norm[1].clone())
            self._known = [*self._known[1 - KEPT :], known]

        return see

    def _predict(self, router: RouterCall) -> list[_Prediction]:
        found: list[_Prediction] = []
        earlier = [known for known in reversed(self._known) if known.tokens is router.tokens]
        for distance, known in zip(DISTANCES, earlier, strict=False):
            for source, inputs in (("router", known.inputs), ("residual", router.normed(known.residual))):
                if inputs is None or inputs.numel() != router.inputs.numel():
                    continue
                reason = self._unsound(router, inputs)
                experts = None if reason else router.candidates(inputs, EXTRA)
                if experts is None:
                    self._refuse(router.layer, reason or "its router shows no scores")
                    return []
                found.append(_Prediction(distance, source, experts, router.cosine(inputs)))
        return found

    def _unsound(self, router: RouterCall, inputs: Tensor) -> str:
        """Why a router must not be run on the side; empty if it may. Looked at once."""
        if id(router.module) in self._sound:
            return ""
        if router.changes(inputs):
            return "its router changes when it runs"
        self._sound.add(id(router.module))
        return ""

    def _refuse(self, layer: MoELayer, reason: str) -> None:
        self._refused.setdefault(layer.key, (layer, reason))

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Compare what was foreseen with what the experts are called with."""
        predictions = self._predictions.pop(id(layer.router), [])
        tokens = self._frame.tokens_of(layer, len(call.ids)) if self._frame is not None else None
        if tokens is None or not predictions:
            return
        ids, weights = tokens.select(call.ids.detach()), tokens.select(call.weights.detach())
        valid = (ids >= 0) & (ids < layer.num_experts)
        if layer.traits.zero_weight_is_none:
            valid &= weights != 0
        first = tokens.position.to(ids.device) == 0
        groups = tokens.group.to(ids.device) * 2 + first
        for prediction in predictions:
            values = _compare(prediction, ids, weights, valid)
            sums = torch.zeros(2 * len(tokens.groups), values.shape[1], dtype=torch.float64, device=values.device)
            sums.index_add_(0, groups, values)
            self.later(lambda sums=sums, prediction=prediction: self._take(layer.key, tokens, prediction, sums))  # type: ignore[misc]

    def _take(self, layer: LayerKey, tokens: Tokens, prediction: _Prediction, sums: Tensor) -> None:
        host = sums.cpu().numpy()
        for entry in tokens.present:
            for first in (False, True):
                values = host[2 * entry + first]
                key = (layer, prediction.distance, prediction.source, tokens.groups[entry], first)
                if values[0]:
                    self._sums[key] = self._sums[key] + values if key in self._sums else values

    def commit(self) -> None:
        """The forward has ended well."""
        super().commit()
        self._forget()

    def discard(self) -> None:
        """The forward has failed."""
        super().discard()
        self._forget()

    def _forget(self) -> None:
        self._frame, self._known, self._predictions = None, [], {}

    def checks(self) -> list[CheckRow]:
        """A row for each layer that is not predicted."""
        return [
            CheckRow("lookahead", "skipped", None, None, f"not predicted: {reason}", layer)
            for layer, reason in self._refused.values()
        ]

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``lookahead``."""
        held, self._sums = self._sums, {}
        if not held:
            return {}
        values = np.stack(list(held.values()))
        ranks = slice(4, 5 + EXTRA), slice(5 + EXTRA, None)
        names = [
            {"distance": distance, "input": source, "first": first, **columns_of(layer, group)}
            for layer, distance, source, group, first in held
        ]
        frame = pl.DataFrame(names).with_columns(
            tokens=pl.Series(values[:, 0]).cast(pl.Int64),
            selections=pl.Series(values[:, 1]).cast(pl.Int64),
            first_hits=pl.Series(values[:, 2]).cast(pl.Int64),
            cosine_sum=pl.Series(values[:, 3]),
            hits=integer_lists(values[:, ranks[0]]),
            exact=integer_lists(values[:, ranks[1]]),
        )
        return {"lookahead": frame}


def _compare(prediction: _Prediction, ids: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """(tokens, 22) float64: one, selections, first choice foreseen, cosine; then hits, and all hit, by width."""
    k, chosen = ids.shape[1], valid.sum(1)
    experts = prediction.experts.to(ids.device)
    match = (ids[:, :, None] == experts[:, None, :]) & valid[:, :, None]
    place = torch.where(match.any(2), match.int().argmax(2), k + EXTRA)  # rank of each selection among the candidates
    widths = k + torch.arange(EXTRA + 1, device=ids.device)
    hits = (place[:, :, None] < widths).sum(1)
    strongest = torch.where(valid, weights.float(), -torch.inf).argmax(1, keepdim=True)
    first = ((ids.gather(1, strongest) == experts[:, :1]) & valid.any(1, keepdim=True))[:, 0]
    columns = (torch.ones_like(chosen), chosen, first, prediction.cosine.to(ids.device))
    alone = torch.stack([column.double() for column in columns], 1)
    return torch.cat([alone, hits.double(), (hits == chosen[:, None]).double()], 1)
