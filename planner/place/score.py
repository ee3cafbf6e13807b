"""How a placement does on text that it was not made from: load per device, per window and per forward pass; traffic.

All fields are sums, so that scores of several pieces of text add up; rates are computed on reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moescope.errors import PlanError
from planner.place.dispatch import Dispatch, passes_of, sent
from planner.place.slots import Placement
from planner.place.stream import Part, Requests, over_parts
from planner.place.windows import By
from profiler.metrics._arrays import FloatArray, IntArray, ratio


@dataclass(frozen=True)
class Score:
    """Loads and traffic of one placement on one workload. A pair is a token and one of its experts.

    Attributes:
        load: (windows, layers, D) pairs that each device computes.
        passes: (layers,) forward passes that use any expert of the layer.
        pass_pairs: (layers,) pairs.
        pass_largest: (layers,) sum over passes of the pairs of the busiest device.
        remote_pairs: (layers,) pairs whose expert is not on the token's home device.
        fan_out: (layers,) sum over tokens of the devices that its experts lie on.
        remote_fan_out: (layers,) the same without the home device: copies of a token that are sent.
        node_fan_out: (layers,) sum over tokens of the nodes that its experts lie on.
        tokens: (layers,) tokens that use any expert.
        adjacent: (layers - 1,) pairs of an expert of a layer and one of the next that the same token uses.
        moves: of those, the pairs on different devices: what travels if a token stays where its expert ran.
    """

    load: IntArray
    passes: IntArray
    pass_pairs: IntArray
    pass_largest: IntArray
    remote_pairs: IntArray
    fan_out: IntArray
    remote_fan_out: IntArray
    node_fan_out: IntArray
    tokens: IntArray
    adjacent: IntArray
    moves: IntArray

    @property
    def devices(self) -> int:
        """D."""
        return int(self.load.shape[-1])

    def balancedness(self) -> FloatArray:
        """(windows, layers) mean over largest load of a device, 0..1; NaN without load."""
        return balancedness(self.load)

    @property
    def mean_balancedness(self) -> float:
        """Mean of :meth:`balancedness` over windows and layers."""
        return float(np.nanmean(self.balancedness()))

    @property
    def pass_balancedness(self) -> float:
        """Part of the devices' time that is used if every layer of every pass waits for its busiest device, 0..1."""
        return float(ratio(self.pass_pairs.sum() / self.devices, self.pass_largest.sum()))

    def pass_balancedness_of_layers(self) -> FloatArray:
        """(layers,) the same for each layer."""
        return ratio(self.pass_pairs / self.devices, self.pass_largest)

    @property
    def remote_share(self) -> float:
        """Part of the pairs whose expert is not on the token's home device, 0..1."""
        return float(ratio(self.remote_pairs.sum(), self.pass_pairs.sum()))

    @property
    def mean_fan_out(self) -> float:
        """Devices that a token's experts of one layer lie on, 1..min(k, D)."""
        return float(ratio(self.fan_out.sum(), self.tokens.sum()))

    @property
    def mean_node_fan_out(self) -> float:
        """Nodes that a token's experts of one layer lie on."""
        return float(ratio(self.node_fan_out.sum(), self.tokens.sum()))

    @property
    def copies_per_token(self) -> float:
        """Devices other than its home that a token is sent to, per layer."""
        return float(ratio(self.remote_fan_out.sum(), self.tokens.sum()))

    @property
    def move_share(self) -> float:
        """Part of the pairs of adjacent layers' experts that lie on different devices, 0..1; NaN of one layer."""
        return float(ratio(self.moves.sum(), self.adjacent.sum()))


def balancedness(load: IntArray | FloatArray) -> FloatArray:
    """Mean over largest load, 0..1, of loads (..., D); NaN without load. 1 = all devices carry as much."""
    return ratio(load.mean(axis=-1), load.max(axis=-1))


def sglang_balancedness(load: IntArray | FloatArray) -> FloatArray:
    """(mean + 1e-5) / (max + 1e-5), as SGLang logs it: the same but for devices without load, where it is 1."""
    both: FloatArray = (load.mean(axis=-1) + 1e-5) / (load.max(axis=-1) + 1e-5)
    return both


def tensorrt_imbalance(load: IntArray | FloatArray) -> FloatArray:
    """(max - mean) / mean, 0..D-1, as TensorRT-LLM states it; 0 = all devices carry as much, NaN without load."""
    mean = load.mean(axis=-1)
    return ratio(load.max(axis=-1) - mean, mean)


def score(
    work: Requests, placement: Placement, *, count: int = 4, by: By = "requests", batch: int = 64,
    chunk: int | None = None, dispatch: Dispatch = "local",
) -> Score:  # fmt: skip
    """Replay a workload on a placement.

    Requests are dealt to home devices in turn, and their tokens are sent from there.

    Args:
        work: one token per pass, at once or in parts: later text than the placement was made from.
        placement: of the same layers and experts.
        count: windows that loads are added up over; fewer where there are fewer requests.
        by: what windows are cut by.
        batch: requests that are decoded together in one pass.
        chunk: instead, tokens of one request per pass, as prompts are read.
        dispatch: which replica of an expert a token is sent to.

    Raises:
        PlanError: they do not fit together, or as :func:`planner.place.dispatch.passes_of`.
    """
    if (work.num_layers, work.num_experts) != (placement.num_layers, placement.num_experts):
        raise PlanError(
            f"the workload has {work.num_layers} layers of {work.num_experts} experts, the placement"
            f" {placement.num_layers} of {placement.num_experts}"
        )
    whole = work.num_requests if by == "requests" else work.num_passes
    windows = max(min(count, whole), 1)
    edges = np.array([whole * one // windows for one in range(1, windows + 1)])
    one = partial(_of_part, placement=placement, edges=edges, by=by, batch=batch, chunk=chunk, dispatch=dispatch)
    parts = list(over_parts(work, one, multiple=batch if chunk is None else 1))
    return Score(**{name: np.sum([getattr(one, name) for one in parts], axis=0) for name in vars(parts[0])})


def _of_part(
    part: Part, *, placement: Placement, edges: IntArray, by: By, batch: int, chunk: int | None, dispatch: Dispatch
) -> Score:
    """Sums over one part; edges (windows,): requests, or passes, at which windows end."""
    owner = part.work.request_of_pass + part.first
    home, turn = owner % placement.devices, passes_of(part.work, batch=batch, chunk=chunk)
    window = np.searchsorted(edges, owner if by == "requests" else _numbers(part), side="right")
    shape = len(edges), placement.devices, placement.nodes
    loads, sums, adjacent, stays = [], [], [], []
    before: IntArray | None = None
    for token, device in sent(part, placement, home=home, dispatch=dispatch):
        load, row, held = _layer(token, device, home, turn, window, shape)
        loads.append(load)
        sums.append(row)
        if before is not None:
            adjacent.append(int((before.sum(1) * held.sum(1)).sum()))
            stays.append(int(np.einsum("td,td->", before, held)))
        before = held
    totals, pairs = np.array(sums, np.int64), np.array(adjacent, np.int64)
    return Score(
        load=np.stack(loads, axis=1), passes=totals[:, 0], pass_pairs=totals[:, 1], pass_largest=totals[:, 2],
        remote_pairs=totals[:, 3], fan_out=totals[:, 4], remote_fan_out=totals[:, 5],
        node_fan_out=totals[:, 6], tokens=totals[:, 7], adjacent=pairs, moves=pairs - np.array(stays, np.int64),
    )  # fmt: skip


def _numbers(part: Part) -> IntArray:
    """(passes,) numbers of the passes of a part in the whole text."""
    return np.arange(part.work.num_passes) + part.before


def added(scores: Sequence[Score]) -> Score:
    """Scores of several pieces of text as one; windows stand one behind another."""
    sums = {
        name: np.sum([getattr(one, name) for one in scores], axis=0) for name in vars(scores[0]) if name != "load"
    }  # fmt: skip
    return Score(load=np.concatenate([one.load for one in scores]), **sums)


def _layer(
    token: IntArray, device: IntArray, home: IntArray, turn: IntArray, window: IntArray, shape: tuple[int, int, int]
) -> tuple[IntArray, tuple[int, ...], IntArray]:
    """(windows, D) load, the sums of ``Score`` from ``passes`` to ``tokens``, and (tokens, D) pairs of each token.

    token, device (pairs,); home, turn, window (tokens,): its home device, pass and window; shape = (windows, D, nodes).
    """
    count, devices, nodes = shape
    held = np.bincount(token * devices + device, minlength=len(home) * devices).reshape(-1, devices)
    load = np.bincount(window[token] * devices + device, minlength=count * devices).reshape(count, devices)
    every = np.bincount(turn[token] * devices + device, minlength=(int(turn.max(initial=-1)) + 1) * devices)
    largest = every.reshape(-1, devices).max(axis=1)
    reached = held > 0
    at_home = reached[np.arange(len(home)), home]
    at_nodes = reached.reshape(len(home), nodes, -1).any(axis=2)
    sums = (
        int((largest > 0).sum()), len(token), int(largest.sum()), int((device != home[token]).sum()),
        int(reached.sum()), int(reached.sum() - at_home.sum()), int(at_nodes.sum()), int(reached.any(1).sum()),
    )  # fmt: skip
    return load.astype(np.int64), sums, held.astype(np.int64)
