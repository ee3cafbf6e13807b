"""How much attention the first position draws: table ``attention``. Attention sinks show here.

The sink is position 0, the first real token of each row, whatever token it is (arXiv 2309.17453 describes it, and
2507.23279 takes it as the sink of its decay). Every query of a later position counts; where a window has left position
0 behind, its probability is 0, and that counts too.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from profiler.capture.attention import AttentionCall, sink_probability, watched_attention
from profiler.capture.batch import BlockBatch, Group, Tokens
from profiler.capture.discovery import MoELayer
from profiler.capture.frame import Frame
from profiler.capture.hooks import Hooks
from profiler.capture.sequences import BatchRows
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.base import double_lists, scatter_sum
from profiler.recorders.staged import Staged

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

_CROSS = re.compile("cross|encoder_attn|encdec", re.IGNORECASE)
"""Names of attention whose keys are those of an encoder, where position 0 is another text's."""

UNKNOWN = -(1 << 40)
"""Column of a row that has had no real token yet."""


class SinkSums(Staged):
    """Sums of the attention probability of position 0, per head, domain and phase.

    Layers without softmax attention (linear attention, state spaces) give no rows, nor do layers whose keys are
    compressed (DeepSeek V4), where position 0 is no key of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[tuple[int, Group], tuple[int, NDArray[np.float64]]] = {}

    def add(self, layer: int, call: AttentionCall, tokens: Tokens, column: Tensor) -> None:
        """Add what one layer did in a forward.

        Args:
            layer: index of the decoder layer.
            call: its attention.
            tokens: the tokens of the forward.
            column: (batch,) place of position 0 among the keys, below 0 where it has been left behind.
        """
        probability = tokens.select(sink_probability(call, column).flatten(0, 1))  # shape: (real tokens, heads)
        device, groups, heads = probability.device, len(tokens.groups), probability.shape[1]
        later = tokens.position.to(device) > 0
        group = tokens.group.to(device)[later]
        keys = group[:, None] * heads + torch.arange(heads, device=device)
        sums = scatter_sum(keys.flatten(), probability[later].flatten(), groups * heads).view(groups, heads)
        table = torch.cat([scatter_sum(group, None, groups)[:, None], sums], 1)
        self.later(lambda: self._take(layer, tokens, table.cpu().numpy()))

    def _take(self, layer: int, tokens: Tokens, table: NDArray[np.float64]) -> None:
        for entry in tokens.present:
            key = (layer, tokens.groups[entry])
            queries, sums = self._sums.get(key, (0, np.zeros(table.shape[1] - 1)))
            self._sums[key] = (queries + int(table[entry, 0]), sums + table[entry, 1:])

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``attention``, one row per layer, domain and phase that had a query after the first position."""
        held, self._sums = self._sums, {}
        frames = [
            pl.DataFrame({"queries": [queries]}).with_columns(
                sink_sum=double_lists(sums[None]), layer=pl.lit(layer), domain=pl.lit(domain), phase=pl.lit(phase)
            )
            for (layer, (domain, phase)), (queries, sums) in held.items()
            if queries
        ]
        return {"attention": pl.concat(frames)} if frames else {}


class AttentionRecorder(SinkSums):
    """The probe of level ``attention``: follows position 0 through padding, caches and windows."""

    needs_rows = False

    def __init__(self) -> None:
        super().__init__()
        self._observer: Observer | None = None
        self._layers: dict[int, int] = {}
        self._starts: WeakKeyDictionary[BatchRows, Tensor] = WeakKeyDictionary()
        self._known: tuple[Frame, Tensor] | None = None

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Watch the attention of the model's decoder layers."""
        self._observer, self._layers = observer, layers_by_module(observer.found.stack)
        stack.enter_context(watched_attention(self._saw))

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Nothing to see there."""

    def commit(self) -> None:
        """The forward has ended well."""
        super().commit()
        self._known = None

    def discard(self) -> None:
        """The forward has failed."""
        super().discard()
        self._known = None

    def _saw(self, call: AttentionCall) -> None:
        frame = self._observer.frame if self._observer is not None else None
        layer = self._layers.get(id(call.module))
        if frame is None or layer is None or not len(frame.tokens) or not is_self_attention(call, frame.inputs.shape):
            return
        total = frame.rows.columns + frame.inputs.shape[1]
        # A window's cache holds the last keys, a static one has room for keys to come.
        self.add(layer, call, frame.tokens, self._start(frame) - max(0, total - call.key.shape[2]))

    def _start(self, frame: Frame) -> Tensor:
        """(batch,) column of the first real token of each row, counted from the row's first column ever."""
        if self._known is not None and self._known[0] is frame:
            return self._known[1]
        rows, (batch, length) = frame.rows, frame.inputs.shape
        start = self._starts.get(rows)
        if start is None:
            start = torch.full((batch,), UNKNOWN, device=frame.inputs.device)
            if rows.columns:  # a cache that nobody saw being filled
                start = _first_of(frame.inputs.attention_mask, start, rows.columns + length)
        real = torch.ones(batch * length, dtype=torch.bool, device=start.device)
        if frame.tokens.keep is not None:
            real = torch.zeros_like(real).index_fill_(0, frame.tokens.keep.to(real.device), True)
        real = real.view(batch, length)
        found = torch.where(real.any(1), rows.columns + real.int().argmax(1), UNKNOWN)
        self._starts[rows] = start = torch.where(start == UNKNOWN, found, start)
        self._known = (frame, start)
        return start


def layers_by_module(stack: nn.ModuleList) -> dict[int, int]:
    """id of every module inside the decoder layers -> index of its layer; attention to another stack is left out."""
    return {
        id(inner): index
        for index, layer in enumerate(stack)
        for name, inner in layer.named_modules()
        if not _CROSS.search(name)
    }


def is_self_attention(call: AttentionCall, shape: tuple[int, int]) -> bool:
    """Whether the queries are the tokens of a forward of shape (batch, length), and the keys tokens too."""
    fits = (call.query.shape[0], call.query.shape[2]) == shape and call.key.shape[0] == call.query.shape[0]
    paged = call.options.get("cache") is not None  # it would be written twice
    return fits and not paged and getattr(call.module, "compressor", None) is None


def _first_of(mask: object, start: Tensor, width: int) -> Tensor:
    """(batch,) first real column by a 2-D mask over all columns; column 0 without such a mask."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= width:
        return mask.to(start.device).ne(0).int().argmax(1)
    return torch.zeros_like(start)
