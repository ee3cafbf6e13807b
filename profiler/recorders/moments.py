"""Second moments of what enters the experts of each layer: table ``moment``.

Per layer the sum of x x^T over tokens, (width, width): what low-rank methods whiten with (SVD-LLM, Sub-MoE's dagger
variant), GPTQ's Hessian of the experts' first projection, and principal directions. Nothing inside the experts is
looked at. A layer takes width^2 x 8 bytes on the host and half of that per shard, in 32 bits: 32 MiB at 2048 channels.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from profiler.capture.batch import BlockBatch, LayerKey
from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.base import double_lists, token_parts
from profiler.recorders.staged import Staged

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

MomentKey = tuple[LayerKey, str, str]
"""((layer, step), domain, phase); the domain is empty where vectors are pooled."""


class MomentRecorder(Staged):
    """Sums of x x^T: float32 within a forward, float64 between forwards, on the host.

    Args:
        by_domain: keep domains apart.
    """

    needs_rows = False

    def __init__(self, by_domain: bool = False) -> None:
        super().__init__()
        self._by_domain = by_domain
        self._observer: Observer | None = None
        self._sums: dict[MomentKey, tuple[int, NDArray[np.float64]]] = {}

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Remember whose forwards these are."""
        self._observer = observer

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Add the inputs of one layer."""
        frame = self._observer.frame if self._observer is not None else None
        tokens = frame.tokens_of(layer, len(call.ids)) if frame is not None else None
        if tokens is None or not len(tokens):
            return
        inputs = torch.nan_to_num(tokens.select(call.hidden.detach()).float(), nan=0.0, posinf=0.0, neginf=0.0)
        for domain, phase, chosen in token_parts(tokens, inputs.device, by_domain=self._by_domain):
            part = inputs if chosen is None else inputs[chosen]
            # To the host at once: the matrices of all layers together may not fit beside the model.
            self._add_later((layer.key, domain, phase), len(part), (part.mT @ part).cpu())

    def _add_later(self, key: MomentKey, tokens: int, products: Tensor) -> None:
        def take() -> None:
            before, sums = self._sums.get(key, (0, None))
            if sums is None:
                self._sums[key] = (tokens, products.double().numpy())
            else:
                sums += products.numpy()
                self._sums[key] = (before + tokens, sums)

        self.later(take)

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``moment``, one row per channel."""
        held, self._sums = self._sums, {}
        frames = []
        for ((layer, step), domain, phase), (tokens, sums) in held.items():
            frame = pl.DataFrame({"channel": range(len(sums)), "products": double_lists(sums)})
            named = {"layer": layer, "step": step, "domain": domain, "phase": phase, "tokens": tokens}
            frames.append(frame.with_columns(**{name: pl.lit(value) for name, value in named.items()}))
        return {"moment": pl.concat(frames)} if frames else {}
