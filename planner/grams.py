"""The weighted-output Gram matrix of each layer, for some or all domains: it prices any set of experts.

A_ij = sum over tokens of g_i g_j <f_i, f_j>. Masking a set S adds the sum of A over S x S to the squared error of the
layer's output, exactly, before anything is routed anew (:mod:`planner.importance.set_error`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import planner.importance as importance
from compressor.plan import LayerKey
from planner.domains import Mix, pooled
from planner.importance.statistics import Statistics, layers_of
from planner.task import Array, Task

Grams = dict[LayerKey, Array]

SCALED = (
    "The run keeps the Gram matrix pooled over domains: a domain's own is estimated from its exact diagonal and the"
    " pooled cosines. Collect with --vectors-per-domain to have it exactly."
)


def domain_grams(task: Task) -> tuple[list[Grams], bool]:
    """A of each of the task's domains, and whether they are exact.

    Where the run keeps A pooled, a domain's diagonal d is known all the same (``expert_output.gated_norm_square_sum``),
    and its matrix is taken as A_ij sqrt(d_i d_j / (A_ii A_jj)): exact in the diagonal, pooled in the cosines.

    Raises:
        PlanError: the run was not collected at level activations.
    """
    if "grams" not in task.kept:
        task.kept["grams"] = _domain_grams(task)
    found: tuple[list[Grams], bool] = task.kept["grams"]
    return found


def mixed_gram(task: Task, mix: Mix) -> tuple[Grams, bool]:
    """One A per layer over the task's domains, over its own total: 1' A 1 = 1; and whether it is exact.

    ``union``: each domain's A over its total, then their mean, so that a set's price is the mean over domains of its
    relative error. ``tokens``: the sum over all tokens.
    """
    if mix == "tokens":
        total, exact = total_gram(task)
        return {key: gram / _total(gram) for key, gram in total.items()}, exact
    parts, exact = domain_grams(task)
    return {key: np.mean([part[key] / _total(part[key]) for part in parts], axis=0) for key in parts[0]}, exact


def even_gram(task: Task, mix: Mix) -> tuple[Grams, bool]:
    """The same as if every expert were used equally often: A_ij / sqrt(u_i u_j), u = E x the expert's part of use.

    How often an expert is used is a matter of the text; what its absence does to a token that wants it, less so. As
    REAP divides by the number of tokens, this divides both sides of A. An expert that no token used stays at 0.
    """
    grams, exact = mixed_gram(task, mix)
    use = _use(task, mix)
    even = {}
    for key, gram in grams.items():
        scale = np.divide(1.0, np.sqrt(use[key]), out=np.zeros_like(use[key]), where=use[key] > 0)
        even[key] = gram * np.outer(scale, scale)
    return even, exact


def total_gram(task: Task) -> tuple[Grams, bool]:
    """A per layer over all tokens of the task's domains, and whether it is exact."""
    if task.every_domain:
        return _cropped(task, importance.output_gram(task.run)), True
    parts, exact = domain_grams(task)
    return {key: np.sum([part[key] for part in parts], axis=0) for key in parts[0]}, exact


def _domain_grams(task: Task) -> tuple[list[Grams], bool]:
    if len(task.domains) == 1 and task.every_domain:
        return [_cropped(task, importance.output_gram(task.run))], True
    if not pooled(task, "expert_pair"):
        return [_cropped(task, importance.output_gram(task.run, domain=domain)) for domain in task.domains], True
    whole = _cropped(task, importance.output_gram(task.run))
    every = _diagonals(task, None)
    return [_scaled(whole, every, _diagonals(task, domain)) for domain in task.domains], False


def _scaled(whole: Grams, every: Grams, own: Grams) -> Grams:
    scaled = {}
    for key, gram in whole.items():
        ratio = np.divide(own[key], every[key], out=np.zeros_like(every[key]), where=every[key] > 0)
        scaled[key] = gram * np.sqrt(np.outer(ratio, ratio))
    return scaled


def _diagonals(task: Task, domain: str | None) -> Grams:
    statistics = Statistics(task.run, level="activations", domain=domain)
    frame = statistics.experts("expert_output", "gated_norm_square_sum")
    return {key: rows["gated_norm_square_sum"].to_numpy().astype(np.float64) for key, rows in layers_of(frame)}


def _use(task: Task, mix: Mix) -> Grams:
    """(experts,) E x the expert's part of the layer's selections: 1 = used evenly. Domains are mixed as in A."""
    parts = []
    for domain in task.domains:
        load = Statistics(task.run, level="routing", domain=domain).experts("expert_load", "tokens")
        parts.append({key: rows["tokens"].to_numpy().astype(np.float64) for key, rows in layers_of(load)})
    use = {}
    for shape in task.layers:
        counts = [part[shape.key] for part in parts]
        if mix == "union":
            counts = [count / (count.sum() or 1.0) for count in counts]
        total = np.sum(counts, axis=0)
        use[shape.key] = shape.num_experts * total / (total.sum() or 1.0)
    return use


def _cropped(task: Task, grams: Grams) -> Grams:
    """Without experts that hold no weights, and with those that no token used."""
    whole = {}
    for shape in task.layers:
        gram = grams[shape.key][: shape.num_experts, : shape.num_experts]
        whole[shape.key] = np.zeros((shape.num_experts, shape.num_experts))
        whole[shape.key][: len(gram), : gram.shape[1]] = (gram + gram.T) / 2 if gram.shape[0] == gram.shape[1] else gram
    return whole


def _total(gram: Array) -> float:
    total = float(gram.sum())
    return total if total > 0 else 1.0


def relative_error(gram: Array, kept: Sequence[int]) -> float:
    """Squared error of the layer's output when only ``kept`` add to it, over its squared norm."""
    return importance.set_error(gram, kept) / _total(gram)
