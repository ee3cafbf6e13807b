"""Which layers and experts of two runs are the same, also where one model was made of the other by a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import store
from moescope.errors import InputError

Kept = Mapping[tuple[int, int], Sequence[Sequence[int]]]
"""(layer, step) of the original -> for each expert of the model made of it, the experts that it is made of."""

Names = NDArray[np.int16]


@dataclass(frozen=True)
class Made:
    """How the model of one run was made of the other's.

    Attributes:
        base: which of the two runs watched the original.
        kept: the experts that are left; layers that are not named keep all.
        kept_layers: decoder layers of the original that are left, in order; None = all.
    """

    base: Literal["first", "second"]
    kept: Kept
    kept_layers: Sequence[int] | None = None


@dataclass(frozen=True)
class LayerPair:
    """One MoE layer in both runs.

    Attributes:
        first: as the first run describes it.
        second: as the second does.
        num_experts: experts by which they are compared: those of the original.
        names: for each run (experts,) the number in the original by which an expert is compared, of experts that became
            one the lowest, -1 for what never takes a token; None = its own number.
    """

    first: store.LayerInfo
    second: store.LayerInfo
    num_experts: int
    names: tuple[Names | None, Names | None] = (None, None)


def pair_layers(first: store.Run, second: store.Run, made: Made | None = None) -> list[LayerPair]:
    """The MoE layers that both runs have, in order.

    Raises:
        InputError: layers or experts differ in number and nothing says which are which, or not as ``made`` says.
    """
    if made is None:
        _require_same(first, second)
        return [
            LayerPair(one, other, one.num_experts) for one, other in zip(first.layers, second.layers, strict=True)
        ]  # fmt: skip
    base, model = (first, second) if made.base == "first" else (second, first)
    pairs = _made_pairs(base, model, made)
    if made.base == "first":
        return pairs
    return [LayerPair(one.second, one.first, one.num_experts, one.names[::-1]) for one in pairs]


def renamed(
    ids: NDArray[np.int16], weights: NDArray[np.floating[Any]] | None, names: Names | None
) -> tuple[NDArray[np.int16], NDArray[np.floating[Any]] | None]:
    """Selections (tokens, k) by the names of experts; what two experts of one name weigh goes to the first of them."""
    if names is None:
        return ids, weights
    result = np.where(ids >= 0, names[np.maximum(ids, 0)], np.int16(-1)).astype(np.int16)
    held = None if weights is None else weights.copy()
    for later in range(1, result.shape[1]):
        for earlier in range(later):
            twice = (result[:, later] >= 0) & (result[:, later] == result[:, earlier])
            if held is not None:
                held[twice, earlier] += held[twice, later]
                held[twice, later] = 0
            result[twice, later] = -1
    return result, held


def _made_pairs(base: store.Run, model: store.Run, made: Made) -> list[LayerPair]:
    places = {layer: place for place, layer in enumerate(made.kept_layers)} if made.kept_layers is not None else None
    there = {(one.layer, one.step): one for one in model.layers}
    pairs = []
    for layer in base.layers:
        if places is not None and layer.layer not in places:
            continue
        key = (layer.layer if places is None else places[layer.layer], layer.step)
        if key not in there:
            raise InputError(f"run {model.name!r} has no MoE layer {key[0]}, which the plan leaves")
        other = there.pop(key)
        members = made.kept.get((layer.layer, layer.step)) or [[expert] for expert in range(layer.num_experts)]
        if other.num_experts < len(members):
            raise InputError(
                f"layer {key[0]} of run {model.name!r} has {other.num_experts} experts; the plan leaves {len(members)}"
            )
        pairs.append(LayerPair(layer, other, layer.num_experts, _names(layer, other, members)))
    if there:
        raise InputError(f"run {model.name!r} has a MoE layer {min(there)[0]} that the plan does not leave")
    return pairs


def _names(
    layer: store.LayerInfo, other: store.LayerInfo, members: Sequence[Sequence[int]]
) -> tuple[Names, Names]:  # fmt: skip
    mine, theirs = np.arange(layer.num_experts, dtype=np.int16), np.full(other.num_experts, -1, np.int16)
    for expert, made_of in enumerate(members):
        mine[list(made_of)] = theirs[expert] = min(made_of)
    return mine, theirs


def _require_same(first: store.Run, second: store.Run) -> None:
    names = f"{first.name!r} and {second.name!r}"
    if len(first.layers) != len(second.layers):
        raise InputError(
            f"runs {names} have {len(first.layers)} and {len(second.layers)} MoE layers; only runs of models of one "
            "shape can be compared"
        )
    for one, other in zip(first.layers, second.layers, strict=True):
        for what in ("layer", "step", "num_experts"):
            here, there = getattr(one, what), getattr(other, what)
            if here != there:
                words = "experts" if what == "num_experts" else "as index of a MoE layer"
                raise InputError(
                    f"runs {names} have {here} and {there} {words} (layer {one.layer}); only runs of models of one "
                    "shape can be compared"
                )
