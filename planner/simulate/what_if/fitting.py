"""Values that are found per layer on the one half of the text, for the other half to judge."""

from __future__ import annotations

import numpy as np

from planner.simulate.what_if.blocks import Layer, Subject
from planner.simulate.what_if.choosing import chosen_logits
from profiler.metrics._arrays import FloatArray

FITTED_TOKENS = 1 << 22
"""Tokens of a layer from which a value is found at most."""


def median_ratio(subject: Subject, layer: Layer) -> float:
    """Median of second over first gate weight, of tokens with two experts or more; NaN where there are none."""
    found, tokens = [np.zeros(0, np.float32)], 0
    for block in subject.blocks(layer):
        two = (block.ids[:, 1] >= 0) & (block.weights[:, 0] > 0) if block.ids.shape[1] > 1 else np.zeros(0, np.int64)
        found.append(block.weights[two, 1] / block.weights[two, 0] if block.ids.shape[1] > 1 else found[0])
        tokens += len(block.ids)
        if tokens >= FITTED_TOKENS:
            break
    ratios = np.concatenate(found)
    return float(np.median(ratios)) if len(ratios) else float("nan")


def null_biases(subject: Subject, layer: Layer, targets: FloatArray) -> FloatArray:
    """(V,) logit b of null experts that leaves so many experts per token on average."""
    found, tokens = [], 0
    for block in subject.blocks(layer):
        logits, _ = chosen_logits(block)
        found.append(logits[block.ids >= 0].astype(np.float32))
        tokens += len(block.ids)
        if tokens >= FITTED_TOKENS:
            break
    if not tokens:
        return np.full(len(targets), np.nan)
    falling = -np.sort(-np.concatenate(found))
    place = np.rint(targets * tokens).astype(np.int64)
    # All stay below the least logit; b itself does not stay, so it is the first one that goes.
    beyond = np.append(falling, np.nextafter(falling[-1], -np.inf)).astype(np.float64)
    values: FloatArray = beyond[np.clip(place, 0, len(falling))]
    return values
