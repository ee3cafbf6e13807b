"""What a source's layer axis and expert ids mean: from the source, the model's configuration, and the user's word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import store
from moescope.errors import ImportFileError
from profiler.importers.model_config import ModelShape, model_shape
from profiler.importers.recording import ImportOptions

MAX_EXPERTS = 1 << 15
"""Ids are kept in 16 bits."""

MAX_LAYERS = 4096


@dataclass(frozen=True)
class Axis:
    """The layers of a recording, and which entries of the source's layer axis they are.

    Attributes:
        layers: as a run's table ``layer`` wants them.
        kept: (layers,) entries of the source's axis that are MoE layers.
        dropped: entries that belong to dense layers; whatever they hold must be "no expert".
    """

    layers: list[store.LayerInfo]
    kept: NDArray[np.int64]
    dropped: NDArray[np.int64]


def layer_axis(
    *,
    options: ImportOptions,
    path: Path,
    entries: int,
    top_k: int = 0,
    num_experts: int = 0,
    numbers: Sequence[int] | None = None,
    largest: Callable[[], int] | None = None,
) -> Axis:
    """Tell what the entries of a layer axis are.

    Args:
        options: with the model's configuration, or what the user said.
        path: of the source, for messages.
        entries: length of the axis.
        top_k: experts per token in the source; 0 = it does not say.
        num_experts: experts per layer in the source; 0 = it does not say.
        numbers: decoder-layer index of each entry, where the source says so.
        largest: finds the largest id of the source; asked only to tell the user what the least number is.

    Raises:
        ImportFileError: nothing says how many experts there are, or the source and the configuration contradict.
    """
    shape = model_shape(options.config) if options.config else None
    experts = _agreed("experts per layer", path, num_experts, options.num_experts, shape.num_experts if shape else 0)
    if not experts:
        raise ImportFileError(
            f"{path} does not say how many experts a layer has: give --config MODEL, or --num-experts"
            + (f" (at least {largest() + 1}; experts that were never used leave no id)" if largest else "")
        )
    if not 1 <= experts <= MAX_EXPERTS or not 1 <= entries <= MAX_LAYERS:
        raise ImportFileError(
            f"{path}: {entries} layers of {experts} experts; at most {MAX_LAYERS} of {MAX_EXPERTS} can be read"
        )
    k = top_k or options.top_k or (shape.top_k if shape else 0)
    if shape and shape.top_k and top_k and top_k != shape.top_k:
        raise ImportFileError(f"{path} has {top_k} experts per token, --config takes {shape.top_k}: another model's?")
    kept, names = _entries(shape, path, entries, numbers)
    layers = [
        store.LayerInfo(
            layer=int(name), num_experts=experts, top_k=k, num_shared=shape.num_shared if shape else 0,
            expert_width=shape.expert_width if shape else 0,
        )
        for name in names
    ]  # fmt: skip
    return Axis(layers, kept, np.setdiff1d(np.arange(entries), kept))


def require_dense_empty(ids: NDArray[np.integer], axis: Axis, path: Path, *, empty: int = -1) -> None:
    """Check that entries of dense layers hold no expert: ids (entries, ...), up to ``empty`` = none.

    ``empty`` is 0 for engines whose buffers begin as zeros, which a dense layer leaves as they are.

    Raises:
        ImportFileError: one does; then the configuration is another model's.
    """
    for entry in axis.dropped.tolist():
        if (ids[entry] > empty).any():
            raise ImportFileError(
                f"{path}: layer {entry} is dense by --config, but uses expert {ids[entry].max()}: another model's?"
            )


def _entries(
    shape: ModelShape | None, path: Path, entries: int, numbers: Sequence[int] | None
) -> tuple[NDArray[np.int64], Sequence[int]]:
    """Kept entries of the axis, and the decoder-layer index of each."""
    if numbers is not None:
        if len(numbers) != entries or len(set(numbers)) != entries or min(numbers) < 0 or max(numbers) >= MAX_LAYERS:
            raise ImportFileError(f"{path}: its layer numbers {list(numbers)[:8]} do not name {entries} layers")
        order = np.argsort(np.asarray(numbers), kind="stable")
        names = [int(numbers[entry]) for entry in order]
        if shape and not set(names) <= set(shape.layers):
            strange = sorted(set(names) - set(shape.layers))[0]
            raise ImportFileError(f"{path} has experts in layer {strange}, which is dense or missing by --config")
        return order, names
    if shape is None or entries == len(shape.layers):
        return np.arange(entries), shape.layers if shape else range(entries)
    if entries == shape.num_layers:
        return np.asarray(shape.layers, np.int64), shape.layers
    raise ImportFileError(
        f"{path} has {entries} layers; --config has {len(shape.layers)} MoE layers of {shape.num_layers} in all:"
        " another model's?"
    )


def _agreed(what: str, path: Path, *numbers: int) -> int:
    """The one number that all sources give that give any."""
    given = sorted({number for number in numbers if number})
    if len(given) > 1:
        raise ImportFileError(f"{path}: {what} are {given[0]} by one source and {given[-1]} by another; check --config")
    return given[0] if given else 0
