"""``what_if``: one method, several values, the layers of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

import store
from moescope.cluster import Cluster
from planner.simulate.what_if import choosing, dropping, fitting, rerouting, sinkhorn, smoothing
from planner.simulate.what_if.blocks import BLOCK_TOKENS, COLLECT_SCORES, Block, Layer, Subject
from planner.simulate.what_if.outcome import Refused, Weights, WhatIf
from planner.simulate.what_if.registry import Method, method_named
from planner.simulate.what_if.tally import Tally
from planner.simulate.what_if.telling import assemble
from profiler.metrics._arrays import FloatArray, IntArray
from profiler.metrics._trace import available_cores

Count = Callable[[Block, Layer, FloatArray], Tally]
Bias = Mapping[tuple[int, int], ArrayLike]


def what_if(
    run: store.Run,
    method: str,
    *,
    values: Sequence[float] | None = None,
    weights: Weights = "renormalized",
    domain: str | None = None,
    layers: Sequence[int] | None = None,
    bias: Bias | None = None,
    fitted: bool = False,
    skip_above: float = 0.9,
    bits: tuple[float, float] = (16.0, 4.0),
    limit_tokens: int | None = None,
    cluster: Cluster | None = None,
    tell: Callable[[str], None] | None = None,
) -> WhatIf:
    """Try a rule on the recorded trace. Memory does not grow with its length.

    Args:
        run: the run.
        method: a name in :data:`METHODS`.
        values: what to try; by default those of the method.
        weights: what becomes of the gate weights of the experts that stay. It changes no count here; the outcome says
            it, so that it is known under what it may be measured on the model.
        domain: only sequences of this domain.
        layers: only these decoder layers.
        bias: for ``bias``: per (layer, step), a number per expert.
        fitted: every other sequence finds a value per layer and the others judge. ``ratio``: ``values`` are multiples
            of the layer's median of second over first gate weight (1 is ODP's rule); ``null_experts``: they are mean
            numbers of experts left.
        skip_above: for ``tiers``: T2, the gate weight above beyond which an expert is left out; 1 leaves none out.
        bits: for ``tiers``: of high and of low precision.
        limit_tokens: read evenly spread sequences of about so many tokens.
        cluster: whose workers take the layers, each by the run's path; None = this process.
        tell: told how far it is, where layers are read in several pieces.

    Raises:
        Refused: it makes no sense here, or the run lacks the data; the message says which.
    """
    found = method_named(method)
    if fitted and method not in ("ratio", "null_experts"):
        raise Refused(f"{found.title} takes its values as they are: fitted is for ratio and null_experts")
    scored = reads_scores(run, found)
    subject = Subject.of(run, scored=scored, domain=domain, layers=layers, limit_tokens=limit_tokens)
    subject, notes = _sensible(subject, found, bias)
    if scored:
        _require_scores(subject, found)
    chosen = _values(subject, found, values, fitted)
    fitting_on, judging = subject.halves() if fitted else (subject, subject)
    layer_values = _layer_values(fitting_on, found, chosen, fitted)
    count = _counter(found, scored, bias, skip_above, bits)
    block_tokens = int(max(BLOCK_TOKENS, chosen.max())) if method == "sinkhorn" else BLOCK_TOKENS
    say = tell if tell is not None and len(judging.pieces(tokens=block_tokens)) > 1 else lambda _: None
    done = f"trying {found.title} on the trace, layer {{}} of {len(judging.layers)}"
    if cluster is None:
        tallies = tallied(judging, layer_values, count, block_tokens, tell=lambda layer: say(done.format(layer)))
    else:
        tallies = []
        for tally in cluster.in_order(layer_tally, _jobs(judging, layer_values, count, block_tokens)):
            tallies.append(tally)
            say(done.format(len(tallies)))
    if fitted and len(subject.sequences) < 2:
        notes = (*notes, "There is one sequence: values were found on the tokens that judge them.")
    return assemble(
        judging, found, tallies, chosen, layer_values, weights=weights, scored=scored, fitted=fitted, notes=notes,
        tiers=(skip_above, bits),
    )  # fmt: skip


def refusal(run: store.Run, method: str) -> str | None:
    """Why a method cannot be tried on a run at all; None where it can. Nothing is tried."""
    found = method_named(method)
    try:
        scored = reads_scores(run, found)
        subject = Subject.of(run, scored=scored, domain=None, layers=None, limit_tokens=1)
        nothing = {(one.layer, one.step): np.zeros(one.num_experts) for one in run.layers}
        subject, _ = _sensible(subject, found, nothing)
        if scored:
            _require_scores(subject, found)
    except Refused as refused:
        return str(refused)
    return None


def reads_scores(run: store.Run, method: Method) -> bool:
    """Whether a method goes by router scores on this run: always, or where they are there."""
    return method.needs != "gate weights" or (method.name in ("top_p", "top_k") and run.has_scores)


def _sensible(subject: Subject, method: Method, bias: Bias | None) -> tuple[Subject, tuple[str, ...]]:
    """The layers in which the method makes sense, and what was left out."""
    run, layers = subject.run, list(subject.layers)
    notes: tuple[str, ...] = ()
    if "weights" in run.omissions and method.needs == "gate weights" and not subject.scored:
        raise Refused(f"{method.title} needs gate weights: {run.omissions['weights'].rstrip('.')}")
    if method.skips:
        several = [layer for layer in layers if layer.info.top_k > 1]
        if not several:
            raise Refused(
                f"{method.title} makes no sense with one expert per token: there is none to leave out. Widths of"
                " experts and pruning are what can save here"
            )
        if len(several) < len(layers):
            notes = (f"{len(layers) - len(several)} layers with one expert per token are left out.",)
        layers = several
    if method.name == "bias":
        if not bias:
            raise Refused("additive rerouting needs a vector: give bias={(layer, step): one number per expert}")
        for key, delta in bias.items():
            _require_vector(run, key, delta)
        layers = [layer for layer in layers if layer.key in bias]
        if not layers:
            raise Refused("additive rerouting has no vector for any of these layers")
    return subject.of_layers(layers), notes


def _require_vector(run: store.Run, key: tuple[int, int], delta: ArrayLike) -> None:
    known = {(one.layer, one.step): one.num_experts for one in run.layers}
    if key not in known:
        raise Refused(f"run {run.name!r} has no MoE layer {key[0]}, step {key[1]}")
    vector = np.asarray(delta, np.float64)
    if vector.shape != (known[key],) or not np.isfinite(vector).all():
        raise Refused(f"the vector of layer {key[0]} must be {known[key]} finite numbers, one per expert")


def _require_scores(subject: Subject, method: Method) -> None:
    """Enough scores per token: as many as experts are used, or all."""
    run = subject.run
    kept = run.table("score_chunk", columns=("layer", "step", "width"))
    widths = {
        (layer, step): width
        for layer, step, width in kept.group_by("layer", "step").agg(pl.col("width").max()).iter_rows()
    }
    for layer in subject.layers:
        width, experts = widths.get(layer.key, 0), layer.info.num_experts
        if not width:
            raise Refused(f"layer {layer.info.layer} of run {run.name!r} has no router scores: its router shows none")
        if width < layer.info.top_k:
            raise Refused(
                f"run {run.name!r} keeps {width} router scores of a token that uses {layer.info.top_k} experts in layer"
                f" {layer.info.layer}: {COLLECT_SCORES} {layer.info.top_k + 8}"
            )
        if method.needs == "scores of all experts" and width < experts:
            raise Refused(
                f"{method.title} needs the scores of all {experts} experts, run {run.name!r} keeps {width}: experts"
                f" without score could be given no tokens; {COLLECT_SCORES} {experts}"
            )


def _values(subject: Subject, method: Method, values: Sequence[float] | None, fitted: bool) -> FloatArray:
    """(V,) what to try, checked."""
    most = max(layer.info.top_k for layer in subject.layers)
    experts = max(layer.info.num_experts for layer in subject.layers)
    if values is None:
        values = method.values
        if method.name == "top_k":
            values = [*range(1, (min(experts, most + 8) if subject.scored else most) + 1)]
        elif fitted and method.name == "null_experts":
            values = [most * part / 8 for part in range(1, 9)]
        elif fitted:
            values = (0.5, 0.75, 1.0, 1.25, 1.5)
        elif method.name == "null_experts":
            values = _logit_values(subject)
    chosen = np.asarray(values, np.float64)
    if chosen.ndim != 1 or not len(chosen) or np.isnan(chosen).any():
        raise Refused(f"{method.title} takes one or more numbers")
    low, high = (0.0, float("inf")) if fitted else (method.low, method.high)
    if method.name == "top_k":
        high = float(experts) if subject.scored else float(most)
        if chosen.max() > high and not subject.scored:
            raise Refused(
                f"k = {chosen.max():g} is more than the {most} experts that are recorded, and run"
                f" {subject.run.name!r} holds no router scores: {COLLECT_SCORES}"
            )
    if chosen.min() < low or chosen.max() > high:
        wrong = chosen.min() if chosen.min() < low else chosen.max()
        raise Refused(f"{wrong:g} must lie within {low:g} to {high:g}: {method.value}")
    if method.name in ("top_k", "sinkhorn") and (chosen != np.floor(chosen)).any():
        raise Refused(f"{method.title} takes whole numbers: {method.value}")
    return chosen


def _logit_values(subject: Subject) -> Sequence[float]:
    """Logits between which the chosen experts of the first layer lie."""
    middle = subject.layers[len(subject.layers) // 2]
    parts = np.linspace(0.1, 0.9, 9) * middle.info.top_k
    found = np.unique(fitting.null_biases(subject, middle, parts))
    if np.isnan(found).any():
        raise Refused("there are no values to try: no token of the middle layer has an expert with a score")
    return [float(one) for one in found]


def _layer_values(subject: Subject, method: Method, values: FloatArray, fitted: bool) -> FloatArray:
    """(V, L) the value that each layer gets: where nothing was there to find one in, the one that leaves out none."""
    if not fitted:
        return np.repeat(values[:, None], len(subject.layers), axis=1)
    columns = []
    for layer in subject.layers:
        if method.name == "ratio":
            columns.append(np.minimum(values * np.nan_to_num(fitting.median_ratio(subject, layer)), 1.0))
        else:
            columns.append(np.nan_to_num(fitting.null_biases(subject, layer, values), nan=-np.inf, neginf=-np.inf))
    return np.stack(columns, axis=1)


def _counter(method: Method, scored: bool, bias: Bias | None, skip_above: float, bits: tuple[float, float]) -> Count:
    """What counts one block."""
    if method.name == "tiers":
        if not 0 < skip_above <= 1:
            raise Refused(f"T2 is {skip_above:g}: a share of the gate weight lies within 0 to 1")
        return partial(dropping.tiers, skip_above=skip_above, bits=bits)
    if method.name == "bias":
        vectors = {key: np.asarray(delta, np.float64) for key, delta in (bias or {}).items()}
        return partial(_bias, vectors=vectors)
    return {
        "top_p": choosing.top_p if scored else dropping.top_p,
        "top_k": choosing.top_k if scored else dropping.fewer,
        "ratio": dropping.ratio,
        "threshold": dropping.threshold,
        "null_experts": choosing.null_experts,
        "smoothing": smoothing.smooth,
        "sinkhorn": sinkhorn.balance,
    }[method.name]


def _bias(block: Block, layer: Layer, values: FloatArray, *, vectors: Mapping[tuple[int, int], FloatArray]) -> Tally:
    return rerouting.bias(block, layer, values, delta=vectors[layer.key])


@dataclass(frozen=True)
class LayerJob:
    """One layer of a trial, as it is sent to a worker: what :func:`layer_tally` takes.

    Attributes:
        run: with a trace.
        subject: with one layer, and without its run.
        values: (V, 1) of the layer.
        count: of one block.
        block_tokens: of a block, nearly.
    """

    run: store.SharedRun
    subject: Subject
    values: FloatArray
    count: Count
    block_tokens: int


def layer_tally(job: LayerJob) -> Tally:
    """The tally of one layer; from any process that reaches the run.

    Raises:
        StoreError: it cannot be read, or is another one.
    """
    with job.run.opened() as run:
        return tallied(replace(job.subject, run=run), job.values, job.count, job.block_tokens)[0]


def _jobs(subject: Subject, layer_values: FloatArray, count: Count, block_tokens: int) -> list[LayerJob]:
    shared = store.SharedRun.of(subject.run.path)
    bare: Any = None
    return [
        LayerJob(shared, replace(subject, run=bare, layers=(layer,)), layer_values[:, axis, None],
                 count, block_tokens)
        for axis, layer in enumerate(subject.layers)
    ]  # fmt: skip


def tallied(
    subject: Subject, layer_values: FloatArray, count: Count, block_tokens: int, *,
    tell: Callable[[int], None] = lambda _: None,
) -> list[Tally]:  # fmt: skip
    """One tally per layer: as many blocks as there are cores are read and counted at a time."""
    cores = available_cores()
    found: dict[int, Tally] = {}
    waiting: deque[tuple[int, Future[Tally | None]]] = deque()

    def one(axis: int, numbers: IntArray) -> Tally | None:
        block = subject.read(subject.layers[axis], numbers)
        return count(block, subject.layers[axis], layer_values[:, axis]) if len(block.ids) else None

    def take() -> None:
        axis, counted = waiting.popleft()
        tally = counted.result()
        if tally is not None:
            found[axis] = _merged(found.get(axis), tally)

    pieces = subject.pieces(tokens=block_tokens)
    with ThreadPoolExecutor(cores) as threads:
        for axis in range(len(subject.layers)):
            tell(axis + 1)
            for numbers in pieces:
                waiting.append((axis, threads.submit(one, axis, numbers)))
                if len(waiting) > cores:
                    take()
        while waiting:
            take()
    return [
        found[axis] if axis in found else Tally.empty(len(layer_values), 1, layer.info.num_experts)
        for axis, layer in enumerate(subject.layers)
    ]


def _merged(total: Tally | None, tally: Tally) -> Tally:
    if total is None:
        return tally
    total.merge(tally)
    return total
