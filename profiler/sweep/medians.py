"""ODP's thresholds: per layer the median of second over first gate weight, from text that is not judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.routing import Choice, rerouted
from compressor.routing.rules import Need
from moescope.errors import InputError
from profiler import evaluate
from profiler.capture.discovery import find_moe_layers
from profiler.corpus import TokenBatch
from profiler.evaluation.distribution import tensors_of
from profiler.running import evaluating
from profiler.sweep.activity import Key
from profiler.sweep.reading import Progress


def ratio_medians(
    model: nn.Module, batches: Sequence[TokenBatch], *, progress: Progress | None = None
) -> dict[Key, float]:
    """Median of second over first gate weight in each layer, over the real tokens of a text: ODP's threshold.

    Raises:
        InputError: a layer gives its tokens one expert, or there is no text.
    """
    if not batches:
        raise InputError("--rule ratio=odp: no text is left to take its medians from; give more text or --calibration")
    recorders = {layer.key: _Ratios() for layer in find_moe_layers(model)}
    kept: dict[Key, list[Tensor]] = {key: [] for key in recorders}
    with evaluating(model), torch.no_grad():
        for batch in batches:
            ids, mask = tensors_of(model, batch)
            with rerouted(model, recorders):
                for _ in evaluate.logit_chunks(model, ids, mask):
                    pass
            real = mask.bool().flatten().cpu()
            for key, recorder in recorders.items():
                kept[key] += [values[real] for values in recorder.taken()]
            if progress is not None:
                progress(int(batch.attention_mask.sum()))
    return {key: float(torch.cat(values).median()) for key, values in kept.items() if values}


class _Ratios:
    """A rule under which every choice stands, and that writes down second over first gate weight."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def needs(self, k: int) -> Need:
        """The choice alone."""
        return "choice"

    def __call__(self, choice: Choice, gate: Any) -> Choice:
        """The choice as it is."""
        if choice.k < 2:
            raise InputError("--rule ratio=odp: each token of this model uses one expert, and there is no second one")
        first, second = choice.weights.float().topk(2, dim=1).values.unbind(1)
        self._found.append((second / first.where(first > 0, 1.0)).cpu())
        return choice

    def taken(self) -> list[Tensor]:
        """What was written since the last time."""
        found, self._found = self._found, []
        return found
