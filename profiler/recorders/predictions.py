"""The token that the model holds most likely to come next, at every position: column ``predicted`` of the text.

The language-model head is asked about what leaves the decoder, some tokens at a time: logits of a whole batch would
take gigabytes, and ``collect`` and ``generate`` do without most of them. What models do to logits afterwards (dividing
by a constant, soft caps) leaves the largest where it is; ``collect`` proves that on a text.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from profiler.capture.batch import BlockBatch, Tokens
from profiler.capture.check_rows import CheckRow
from profiler.capture.discovery import MoELayer
from profiler.capture.hooks import Hooks
from profiler.capture.tap import ExpertsCall, TappedRows
from profiler.recorders.staged import Staged

if TYPE_CHECKING:
    from profiler.capture.observer import Observer

MAX_VALUES = 1 << 24
"""Logits that are in memory at once."""

TOLERANCE = 0.05
"""Part of the tokens whose prediction may differ for rounding alone: in 16 bits, close calls fall either way."""


class PredictionRecorder(Staged):
    """The probe of level ``predictions``; the text recorder takes what it has found from :meth:`take`."""

    needs_rows = False

    def __init__(self) -> None:
        super().__init__()
        self._observer: Observer | None = None
        self._found: Tensor | None = None
        self._expected: tuple[int, NDArray[np.int32]] | None = None
        self._differing: float | None = None

    def attach(self, observer: Observer, hooks: Hooks, stack: ExitStack) -> None:
        """Watch what leaves the decoder; before the forward is closed, which its owner's other hook does."""
        self._observer = observer
        hooks.after(observer.found.owner, self._saw_decoder, first=True)

    def saw_experts(
        self, layer: MoELayer, call: ExpertsCall, rows: TappedRows | None, block: BlockBatch | None
    ) -> None:
        """Nothing to see there."""

    @torch.no_grad()
    def _saw_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self._observer.frame if self._observer is not None else None
        hidden = output if isinstance(output, Tensor) else output[0]
        if self._observer is None or frame is None or hidden.numel() % frame.tokens.rows:
            return
        model: Any = self._observer.model
        states = frame.tokens.select(hidden.detach().reshape(frame.tokens.rows, -1))
        self._found = likeliest(model.get_output_embeddings(), states)

    def take(self, tokens: Tokens) -> NDArray[np.int32] | None:
        """(tokens,) most likely next tokens of the forward that has ended; None where none were seen."""
        if self._found is None:
            return None
        found: NDArray[np.int32] = self._found.cpu().numpy()
        self._found = None
        if self._expected is not None:
            number, expected = self._expected
            mine = found[(tokens.sequence == number).cpu().numpy()]
            if len(mine):
                self._expected = None
                self._differing = float((mine != expected).mean()) if len(mine) == len(expected) else 1.0
        return found

    def discard(self) -> None:
        """The forward has failed."""
        super().discard()
        self._found = None

    def drain(self) -> dict[str, pl.DataFrame]:
        """Nothing: predictions stand beside the text."""
        return {}

    def expect(self, sequence: int, predicted: Tensor) -> None:
        """Compare with what the model's own logits say of a sequence, (tokens,), when it comes."""
        self._expected = (sequence, predicted.cpu().numpy().astype(np.int32))

    def checks(self) -> list[CheckRow]:
        """How many predictions differ from those of the model's own logits."""
        if self._differing is None:
            return [CheckRow("predictions", "skipped", None, None, "compared with the model's logits by collect only")]
        status: Literal["pass", "fail"] = "pass" if self._differing <= TOLERANCE else "fail"
        detail = "tokens of one text whose predicted next token is not that of the model's own logits"
        return [CheckRow("predictions", status, self._differing, TOLERANCE, detail)]


def likeliest(head: Any, states: Tensor) -> Tensor:
    """(tokens,) int32 index of the largest logit that the head gives each of states (tokens, hidden)."""
    size = max(1, MAX_VALUES // int(head.weight.shape[0]))
    return torch.cat([head(part).argmax(dim=-1).to(torch.int32) for part in states.split(size)])
