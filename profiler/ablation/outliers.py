"""What massive activations and attention sinks look like while a model reads text: two small tables, no run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from moescope.errors import CaptureError
from profiler.capture.attention import AttentionCall, watched_attention
from profiler.capture.batch import ResidualBatch, Tokens
from profiler.capture.discovery import MoEModel
from profiler.capture.hooks import Hooks
from profiler.recorders.attention import SinkSums, is_self_attention, layers_by_module
from profiler.recorders.residual import ResidualRecorder


@dataclass(frozen=True)
class Outliers:
    """Tables as in a run file, with one row per decoder layer.

    Attributes:
        residual: see table ``residual``.
        attention: see table ``attention``; layers without softmax attention have no row.
    """

    residual: pl.DataFrame
    attention: pl.DataFrame


class OutlierMeter:
    """Sums over the forwards of a model that is called with ``input_ids`` and a 2-D ``attention_mask``, by name."""

    def __init__(self, model: nn.Module, found: MoEModel) -> None:
        self._model, self._found = model, found
        self._layers = layers_by_module(found.stack)
        self._residual, self._sinks = ResidualRecorder(), SinkSums()
        self._tokens: Tokens | None = None
        self._shape = (0, 0)
        self._column: Tensor = torch.zeros(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, forwards count."""
        hooks = Hooks()
        try:
            hooks.before(self._model, self._begin)
            for index, layer in enumerate(self._found.stack):
                hooks.after(layer, partial(self._after, index))
            with watched_attention(self._saw):
                yield
        finally:
            hooks.remove()

    def result(self) -> Outliers:
        """The tables, and start again.

        Raises:
            CaptureError: no decoder layer put out hidden states.
        """
        residual = self._residual.drain().get("residual")
        if residual is None:
            raise CaptureError(f"the residual stream of {type(self._model).__name__} was not seen: no layer has run")
        attention = self._sinks.drain().get("attention", pl.DataFrame(schema={"layer": pl.Int32}))
        return Outliers(residual.sort("layer"), attention.sort("layer"))

    @torch.no_grad()
    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._tokens = None
        if mask is None or mask.ndim != 2:
            return
        real = mask.bool()
        keep = real.flatten().nonzero()[:, 0]
        group = torch.zeros_like(keep)
        position = (real.cumsum(1) - 1).flatten()[keep]
        self._tokens = Tokens(
            sequence=keep // mask.shape[1],
            position=position,
            group=group,
            groups=[("", "prompt")],
            rows=mask.numel(),
            keep=keep,
            batch_row=keep // mask.shape[1],
            present=[0] if len(keep) else [],
        )
        self._shape, self._column = (mask.shape[0], mask.shape[1]), real.int().argmax(1)

    @torch.no_grad()
    def _after(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if self._tokens is None or not isinstance(hidden, Tensor) or hidden.numel() % self._tokens.rows:
            return
        flat = hidden.detach().reshape(self._tokens.rows, -1)
        self._residual.update(ResidualBatch(index, self._tokens, flat, hidden.shape[-1]))
        self._residual.commit()

    def _saw(self, call: AttentionCall) -> None:
        layer = self._layers.get(id(call.module))
        if self._tokens is None or layer is None or not is_self_attention(call, self._shape):
            return
        self._sinks.add(layer, call, self._tokens, self._column)
        self._sinks.commit()
