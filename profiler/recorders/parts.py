"""The sums that importance rests on, per sixteenth of the sequences: table ``expert_part``.

Two halves of the text that rank experts differently say that more text is needed. The rows of both recorders have the
same keys and are merged: selections and gate weights come from the routing, norms from inside the experts.
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from profiler.capture.batch import ExpertRows, LayerKey, RoutingBatch
from profiler.recorders.base import Sums, double_lists, finite, integer_lists, scatter_sum
from profiler.recorders.staged import Staged
from store.parts import NUM_PARTS, part_of_sequence

_Name = tuple[LayerKey, str]


class PartLoadRecorder:
    """Selections and gate weights of routed experts, per part. Level routing."""

    def __init__(self) -> None:
        self._sums = Sums()

    def update(self, batch: RoutingBatch) -> None:
        """Add the selections of a batch; a weight that is no finite number counts as a selection without weight."""
        layers, tokens, _ = batch.ids.shape
        if tokens == 0:
            return
        experts = batch.num_experts
        part = part_of_sequence(batch.tokens.sequence.to(batch.ids.device))
        layer = torch.arange(layers, device=part.device) * NUM_PARTS
        # experts + 1 places, the first for "no expert"; shape: (layers, tokens, k)
        keys = (((layer[:, None] + part) * (experts + 1))[..., None] + (batch.ids + 1)).reshape(-1)
        size = layers * NUM_PARTS * (experts + 1)
        sums = torch.stack([scatter_sum(keys, None, size), scatter_sum(keys, finite(batch.weights).reshape(-1), size)])
        host = sums.view(2, layers, NUM_PARTS, experts + 1)[..., 1:].transpose(2, 3).cpu().numpy()
        for index, key in enumerate(batch.keys):
            self._sums.add((key, ("", "")), host[:, index])

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_part``, one row per routed expert, also where it was not selected."""
        frames = []
        for (key, _), (tokens, gates) in self._sums.drain():
            columns = {"tokens": integer_lists(tokens), "gate_sum": double_lists(gates)}
            frames.append(_frame((key, "routed"), len(tokens), columns))
        return {"expert_part": pl.concat(frames)} if frames else {}


class PartOutputRecorder(Staged):
    """Norms of expert outputs, per part; for shared experts the tokens and gate weights too. Level activations."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[_Name, Tensor] = {}

    def update(self, batch: ExpertRows) -> None:
        """Add the rows of one layer."""
        if not len(batch.token):
            return
        part = part_of_sequence(batch.tokens.sequence.to(batch.token.device))[batch.token]
        keys = batch.expert * NUM_PARTS + part
        gate = finite(batch.gate.abs())
        values: list[Tensor | None] = [batch.norm, gate * batch.norm]
        if batch.kind == "shared":
            values += [None, gate]
        size = batch.num_experts * NUM_PARTS
        sums = torch.stack([scatter_sum(keys, one, size) for one in values]).view(-1, batch.num_experts, NUM_PARTS)
        name = (batch.key, batch.kind)  # what waits for the end of the forward must not hold the rows of the layer
        self.later(lambda: self._take(name, sums))

    def _take(self, name: _Name, sums: Tensor) -> None:
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def drain(self) -> dict[str, pl.DataFrame]:
        """Table ``expert_part``, one row per expert of the layers that saw a token."""
        held, self._sums = self._sums, {}
        frames = []
        for name, sums in held.items():
            values = sums.cpu().numpy()
            columns = {"norm_sum": double_lists(values[0]), "gated_norm_sum": double_lists(values[1])}
            if len(values) > 2:
                columns |= {"tokens": integer_lists(values[2]), "gate_sum": double_lists(values[3])}
            frames.append(_frame(name, values.shape[1], columns))
        return {"expert_part": pl.concat(frames, how="diagonal_relaxed")} if frames else {}


def _frame(name: _Name, experts: int, columns: dict[str, pl.Series]) -> pl.DataFrame:
    (layer, step), kind = name
    keys = {"layer": pl.lit(layer), "step": pl.lit(step), "kind": pl.lit(kind)}
    return pl.DataFrame({"expert": range(experts), **columns}).with_columns(**keys)
