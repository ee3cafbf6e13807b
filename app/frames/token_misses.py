"""Which tokens a cache of experts would have made wait: the trace of one layer, replayed in the order of the run."""

from __future__ import annotations

import numpy as np
import polars as pl

import store
from app.frames.expert_trace import layer_info
from app.frames.token_measure import Measure
from planner.simulate.policies.registry import POLICIES
from planner.simulate.replay import replay
from planner.simulate.workload import decode

HISTORY = 1 << 20
"""Tokens before a sequence that are replayed at most: no cache remembers further back."""

POLICY_NAMES = {
    one.name: one.title for one in POLICIES if one.needs == ("ids",) and not one.fitted and not one.bound
}  # fmt: skip
"""Policies that need only which experts were used, learn from no other text, and know no future."""


def misses(run: store.Run, sequence: int, label: str, policy: str, slots: int) -> pl.DataFrame:
    """One row per token of a sequence: position, missing = its experts that were not in a cache of ``slots`` experts.

    The cache holds experts of this layer alone and goes on from one sequence to the next, each token a pass of its own.

    Raises:
        InputError: there is no such layer.
        PlanError: no such policy.
    """
    layer = layer_info(run, label)
    lengths = run.traced_sequences.filter(pl.col("sequence") <= sequence)
    before = lengths["tokens"].to_numpy().astype(np.int64)[::-1].cumsum()
    if not len(before) or int(lengths["sequence"].to_numpy()[-1]) != sequence:
        return pl.DataFrame(schema=_MISSES)
    kept = max(int(np.searchsorted(before, HISTORY, side="right")), 1)
    first = int(lengths["sequence"].to_numpy()[-kept])
    read = run.layer_selections(layer=layer.layer, step=layer.step, first=first, last=sequence)
    used = np.flatnonzero((read.ids >= 0).any(axis=1))
    missing = np.zeros(len(read.ids), np.int64)
    if len(used):
        work = decode(selections=read.ids[None, None, used], num_experts=layer.num_experts)
        missing[used] = replay(work, policy=policy, slots=slots).missing[0]
    mine = missing[int(read.offsets[-2]) :]
    return pl.DataFrame({"position": np.arange(len(mine)), "missing": mine}, schema=_MISSES)


def measure(label: str, policy: str, slots: int, top_k: int) -> Measure:
    """The words of :func:`misses`."""
    return Measure(
        "misses",
        f"experts missing, layer {label}",
        f"of {top_k}",
        0.0,
        float(top_k),
        note=f"Experts that the token needs and that a cache of {slots} of the layer's experts "
        f"({POLICY_NAMES[policy]}) did not hold, replayed over the sequences in order.",
    )


_MISSES = {"position": pl.Int64, "missing": pl.Int64}
