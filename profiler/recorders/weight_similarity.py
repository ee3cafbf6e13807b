"""How alike the weights of two experts are, with and without matching neurons: table ``expert_weight_similarity``.

The neurons of an expert have no order: an expert whose neurons are shuffled is the same expert, and its flattened
weights say otherwise. So neurons are matched as well, by the assignment with the largest sum of cosines between whole
neurons (gate row, up row and down column one behind the other; M-SMoE aligns by the squared distance of the same).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from profiler.capture.batch import LayerKey
from profiler.capture.check_rows import CheckRow
from profiler.capture.discovery import MoELayer
from profiler.recorders.base import float_lists

MAX_VALUES = 1 << 24
"""Weights in 32 bits that are compared at once."""

MATCH_OPERATIONS = 1e12
"""Bound on the operations of matching neurons in one layer: ten to twenty seconds on a core of 100 GFLOP/s."""

ALL = "all"

Matrices = dict[str, NDArray[np.float32]]
"""(experts, experts) each: cosine, mean_cosine, matched_cosine."""


class WeightSimilarityRecorder:
    """Compares each layer's experts once, when they first run: then their weights are where they can be read.

    Attributes:
        wanted: whether to compare at all.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._seen: set[LayerKey] = set()
        self._frames: list[pl.DataFrame] = []
        self._left_out: list[tuple[MoELayer, str]] = []

    def update(self, layer: MoELayer) -> None:
        """Compare the experts of a layer that has not been seen yet."""
        if layer.key in self._seen or not self.wanted:
            return
        self._seen.add(layer.key)
        reason = _unreadable(layer)
        if reason:
            self._left_out.append((layer, f"the weights of its experts were not compared: {reason}"))
            return
        with torch.no_grad():
            compared, matched = compare_weights(layer)
        pairs = layer.layout.num_weighted * (layer.layout.num_weighted - 1) // 2 if layer.layout else 0
        if matched < pairs:
            what = f"neurons were matched for {matched} of {pairs} pairs of experts, nearest neighbours first"
            self._left_out.append((layer, f"{what}: more takes over {MATCH_OPERATIONS:.0e} operations"))
        for matrix, found in compared.items():
            columns = {name: float_lists(values) for name, values in found.items()}
            frame = pl.DataFrame({"expert": range(layer.num_experts), **columns})
            named = {"layer": layer.layer, "step": layer.step, "matrix": matrix}
            self._frames.append(frame.with_columns(**{name: pl.lit(value) for name, value in named.items()}))

    def checks(self) -> list[CheckRow]:
        """The layers of which something was left out."""
        return [
            CheckRow("weights compared", "skipped", None, None, detail, layer=layer) for layer, detail in self._left_out
        ]

    def drain(self) -> dict[str, pl.DataFrame]:
        """The table, for the layers that were compared since the last drain."""
        frames, self._frames = self._frames, []
        return {"expert_weight_similarity": pl.concat(frames)} if frames else {}


def compare_weights(layer: MoELayer) -> tuple[dict[str, Matrices], int]:
    """Similarities by matrix (gate, up, down, all), and the number of pairs whose neurons were matched.

    Experts without weights (zero, copy, constant ones) have NaN everywhere.
    """
    assert layer.layout is not None, "refused before the run began"
    experts, weighted = layer.num_experts, layer.layout.num_weighted
    grams, means = _sums(layer)
    grams[ALL] = np.sum(list(grams.values()), axis=0)
    means[ALL] = np.concatenate(list(means.values()), axis=1)
    pairs = _pairs_to_match(_cosine(grams[ALL]), affordable_pairs(layer))
    matched = _matched(layer, pairs)
    found = {}
    for name, gram in grams.items():
        fitting = np.full((weighted, weighted), np.nan)
        np.fill_diagonal(fitting, np.diag(gram))
        for (i, j), products in matched.items():
            fitting[i, j] = fitting[j, i] = products[name]
        similarities = {
            "cosine": _cosine(gram),
            "mean_cosine": _cosine(means[name] @ means[name].T),
            "matched_cosine": _cosine(fitting),
        }
        found[name] = {key: _padded(matrix, experts) for key, matrix in similarities.items()}
    return found, len(pairs)


def affordable_pairs(layer: MoELayer) -> int:
    """Pairs whose neurons can be matched within :data:`MATCH_OPERATIONS`: a product of all neurons with all others,
    and an assignment, whose time grows with the cube of the width."""
    assert layer.layout is not None, "refused before the run began"
    width = layer.layout.width
    columns = (3 if layer.layout.gated else 2) * layer.layout.hidden_size
    return int(MATCH_OPERATIONS // (2 * width**2 * columns + 10 * width**3))


def _sums(layer: MoELayer) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Per matrix: scalar products of the flattened weights, (experts, experts), and means over neurons, (experts, d).

    Rows are taken in turns as they stand in memory, so that not all weights are there in 32 bits.
    """
    layout = layer.layout
    assert layout is not None, "refused before the run began"
    grams: dict[str, NDArray[np.float64]] = {}
    means: dict[str, NDArray[np.float64]] = {}
    every = [dict(_neurons(layer, expert)) for expert in range(layout.num_weighted)]
    for name in every[0]:
        # Neurons are the columns of down; the order of its entries does not matter to a scalar product.
        matrices = [weights[name].mT if name == "down" else weights[name] for weights in every]
        rows, columns = matrices[0].shape
        step = min(rows, max(1, MAX_VALUES // (len(matrices) * columns)))
        block = matrices[0].new_empty((len(matrices), step, columns), dtype=torch.float32)
        gram, parts = np.zeros((len(matrices), len(matrices))), []
        for start in range(0, rows, step):
            block = block[:, : rows - start]
            for expert, matrix in enumerate(matrices):
                block[expert] = matrix[start : start + step]
            flat = block.flatten(1)  # shape: (experts, rows of the chunk x columns)
            gram += (flat @ flat.mT).double().cpu().numpy()
            parts.append(block.sum(2 if name == "down" else 1).double().cpu().numpy() / layout.width)
        grams[name] = gram
        means[name] = np.concatenate(parts, axis=1) if name == "down" else np.sum(parts, axis=0)
    return grams, means


def _neurons(layer: MoELayer, expert: int) -> Iterator[tuple[str, Tensor]]:
    """The matrices of one expert as (neurons, hidden): rows of gate and up, columns of down."""
    assert layer.layout is not None, "refused before the run began"
    gate, up = layer.layout.first_projections(layer.experts, expert)
    if gate is not None:
        yield "gate", gate
    yield "up", up
    yield "down", layer.layout.down_weight(layer.experts, expert).mT


def _pairs_to_match(cosine: NDArray[np.float64], most: int) -> list[tuple[int, int]]:
    """All pairs, or as many as can be had: every expert's nearest by the unmatched cosine, then the next nearest."""
    first, second = np.triu_indices(len(cosine), 1)
    if len(first) > most:
        values = np.nan_to_num(cosine, nan=-2.0)
        np.fill_diagonal(values, -np.inf)
        place = np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1, kind="stable")
        nearness = np.minimum(place, place.T)[first, second]
        order = np.lexsort((-values[first, second], nearness))[:most]
        first, second = first[order], second[order]
    return sorted(zip(first.tolist(), second.tolist(), strict=True))


def _matched(layer: MoELayer, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, float]]:
    """Per pair and matrix, the scalar product of the weights with the neurons of the second in the order that fits."""
    found = {}
    mine: dict[str, Tensor] = {}
    held = -1
    for i, j in pairs:
        if i != held:
            held, mine = i, _directions(layer, i)
        others = _directions(layer, j)
        cosine = mine[ALL] @ others[ALL].mT
        _, order = linear_sum_assignment(cosine.cpu().numpy(), maximize=True)
        fitting = torch.from_numpy(order).to(cosine.device)
        products = {
            name: float((mine[name] * others[name][fitting]).sum(dtype=torch.float64)) for name in mine if name != ALL
        }
        found[i, j] = products | {ALL: sum(products.values())}
    return found


def _directions(layer: MoELayer, expert: int) -> dict[str, Tensor]:
    """The matrices of one expert in 32 bits, and under "all" its neurons with length 1."""
    neurons = {name: values.float() for name, values in _neurons(layer, expert)}
    whole = torch.cat(list(neurons.values()), dim=1)
    return neurons | {ALL: torch.nn.functional.normalize(whole, dim=1, eps=torch.finfo(whole.dtype).tiny)}


def _cosine(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    norm = np.sqrt(np.where(np.diag(gram) > 0, np.diag(gram), np.nan))
    cosine: NDArray[np.float64] = np.clip(gram / np.outer(norm, norm), -1.0, 1.0)
    return cosine


def _padded(matrix: NDArray[np.float64], experts: int) -> NDArray[np.float32]:
    whole = np.full((experts, experts), np.nan, np.float32)
    whole[: len(matrix), : len(matrix)] = matrix
    return whole


def _unreadable(layer: MoELayer) -> str:
    """Why the weights cannot be compared; empty if they can."""
    if any(tensor.is_meta for tensor in layer.experts.parameters()):
        return "they are not in memory"
    for _, neurons in _neurons(layer, 0):
        if not neurons.is_floating_point() or neurons.ndim != 2 or neurons.element_size() < 2:
            return "they are packed"
    return ""
