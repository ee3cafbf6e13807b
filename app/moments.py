"""Second moments of a run for the merges that project on them (method ``subspace``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from compressor.plan import LayerKey, MergeStep, Plan
from moescope.errors import PlanError

if TYPE_CHECKING:
    from compressor.edits.moments import LayerMoments


class Moments(Mapping[LayerKey, "LayerMoments"]):
    """(layer, step) -> moments, for the layers that a plan merges by ``subspace``.

    Read layer by layer when asked for: a layer with H channels takes 4 H^2 bytes. Where the plan was made for some
    domains, and the run keeps its sums per domain, only these count.

    Raises:
        PlanError: the run lacks them; the message names the level.
    """

    def __init__(self, run: store.Run, plan: Plan) -> None:
        self._run = run
        self._domains = set(plan.provenance.domains)
        self._keys = [
            (layer.layer, layer.step)
            for step in plan.steps
            if isinstance(step, MergeStep) and step.method == "subspace"
            for layer in step.layers
        ]
        if self._keys:
            self._rows("moment", "moments", self._keys[0])
            self._rows("neuron_activation", "activations", self._keys[0])

    def __getitem__(self, key: LayerKey) -> LayerMoments:
        import torch

        from compressor.edits.moments import LayerMoments

        if key not in self._keys:
            raise KeyError(key)
        inputs = _summed(self._rows("moment", "moments", key), "channel", "products")
        neurons = self._rows("neuron_activation", "activations", key).filter(pl.col("kind") == "routed")
        squares = _summed(neurons, "expert", "square_sum")
        return LayerMoments(input=torch.from_numpy(inputs), activation_square=torch.from_numpy(squares))

    def __iter__(self) -> Iterator[LayerKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _rows(self, table: str, level: str, key: LayerKey) -> pl.DataFrame:
        layer, step = key
        rows = self._run.table(table, layer=layer).filter(pl.col("step") == step)
        if rows.is_empty():
            raise PlanError(
                f"run {self._run.name!r} has no second moments of layer {layer} ({table}): collect it with --level"
                f" routing,{level}"
            )
        chosen = rows.filter(pl.col("domain").is_in(list(self._domains)))
        return rows if chosen.is_empty() else chosen


def _summed(rows: pl.DataFrame, index: str, column: str) -> NDArray[np.float32]:
    """(rows, width): a column of lists, added up over domains and phases, in the order of ``index``."""
    width = len(rows[column][0])
    result = np.zeros((int(rows[index].max()) + 1, width), np.float64)  # type: ignore[arg-type]
    values = rows[column].cast(pl.List(pl.Float64)).list.to_array(width).to_numpy()
    np.add.at(result, rows[index].to_numpy(), values)
    return result.astype(np.float32)
