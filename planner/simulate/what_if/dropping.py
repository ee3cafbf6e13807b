"""Rules that drop experts by their gate weights: nothing but the recorded choice is needed, so every token counts."""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if.blocks import Block, Layer
from planner.simulate.what_if.tally import Tally, prefix_tally
from profiler.metrics._arrays import FloatArray, IntArray


def ratio(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """Of those chosen, those with w_r >= beta x w_1."""
    weights, error = block.weights.astype(np.float64), block.rounding.astype(np.float64)[:, None]
    first = weights[:, :1]
    below = np.maximum(weights - error, 0) / (first + error + 1e-300)
    above = np.where(first > error, (weights + error) / np.where(first > error, first - error, 1.0), np.inf)
    critical = np.where(first > 0, weights / np.where(first > 0, first, 1.0), 1.0)
    below[:, 0] = above[:, 0] = 1.0
    return _drop(block, layer, values, critical, (below, above))


def threshold(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """Of those chosen, those with w_r >= tau."""
    weights, error = block.weights.astype(np.float64), block.rounding.astype(np.float64)[:, None]
    return _drop(block, layer, values, weights, (np.maximum(weights - error, 0), weights + error))


def fewer(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """The first k of those chosen, by gate weight."""
    ranks = np.broadcast_to(-np.arange(1.0, block.ids.shape[1] + 1), block.ids.shape)
    return _drop(block, layer, -values, np.ascontiguousarray(ranks), None)


def top_p(block: Block, layer: Layer, values: FloatArray) -> Tally:
    """The fewest of those chosen whose share of the gate weight adds up to more than p."""
    above, error = weight_above(block), _above_error(block)
    return _drop(block, layer, -values, -above, (-above - error, -above + error))


def tiers(block: Block, layer: Layer, values: FloatArray, *, skip_above: float, bits: tuple[float, float]) -> Tally:
    """High precision while the gate weight above is at most T1, low precision up to ``skip_above``, none beyond.

    Figures, as sums over tokens: selections in high and low precision and skipped; bits of those that are loaded;
    bits by gate weight over the gate weight of those that are loaded.
    """
    above, error = weight_above(block), _above_error(block)
    # At a T1 above T2 nothing is in low precision; T2 itself stays.
    bounds = (-above - error, -above + error)
    high = _drop(block, layer, -np.minimum(values, skip_above), -above, bounds)
    loaded = _drop(block, layer, np.full(len(values), -skip_above), -above, bounds)
    loaded.doubts = np.maximum(loaded.doubts, high.doubts)
    most, least = bits
    in_high, in_any = _active(high), _active(loaded)
    loaded.figures = {
        "high_selections": in_high,
        "low_selections": in_any - in_high,
        "skipped_selections": loaded.selections - in_any,
        "bits_loaded": most * in_high + least * (in_any - in_high),
        "bits_by_weight": most * high.kept + least * (loaded.kept - high.kept),
    }
    return loaded


def weight_above(block: Block) -> FloatArray:
    """(tokens, k) share of the token's gate weight on the experts before each: 0 for the first."""
    shares = block.shares
    above = np.zeros_like(shares)
    np.cumsum(shares[:, :-1], axis=1, out=above[:, 1:])
    return np.minimum(above, 1.0)


def _above_error(block: Block) -> FloatArray:
    """(tokens, k) by how much the rounding of gate weights may change :func:`weight_above`."""
    error, number = block.rounding.astype(np.float64)[:, None], block.own[:, None]
    total = block.weights.astype(np.float64).sum(1, keepdims=True)
    ranks = np.arange(block.ids.shape[1])
    least = np.maximum(total - number * error, 1e-300)
    return np.where(ranks == 0, 0.0, np.minimum((ranks + weight_above(block) * number) * error / least, 1.0))


def _active(tally: Tally) -> FloatArray:
    active: FloatArray = tally.load.sum(1).astype(np.float64)
    return active


def _drop(
    block: Block, layer: Layer, values: FloatArray, critical: FloatArray, bounds: tuple[FloatArray, FloatArray] | None
) -> Tally:
    own: IntArray = block.own
    return prefix_tally(
        ids=block.ids, critical=critical, mass=block.shares, own=own, values=values, bounds=bounds,
        experts=layer.info.num_experts,
    )  # fmt: skip
