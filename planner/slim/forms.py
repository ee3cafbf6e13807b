"""What stays of the experts' neurons, in each of the forms in which it can be stored."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from compressor.plan import LayerKey, LayerShape, SlimExpert, SlimLayer, SlimStep
from moescope.errors import PlanError
from planner.allocation import allocate, part
from planner.probes import Weigh, layer_weights
from planner.slim.neurons import LayerNeurons, Neurons, Scope
from planner.task import Array, Draft, Task, rounded

MULTIPLE = 8
"""What widths are a multiple of unless another number is asked for: grouped kernels of torch refuse rows that are not
multiples of 16 bytes, which 8 values of 16 bits are. Engines that split experts over devices need more, such as 64."""

STEPS = 256
"""Widths per layer that are compared, at most, where layers may differ."""

Mask = NDArray[np.bool_]


def slimmed(
    task: Task,
    method: str,
    scores: Neurons,
    *,
    scope: Scope,
    multiple: int,
    weigh: Weigh,
    unit: str,
    notes: tuple[str, ...],
) -> Draft:
    """The draft that slims by a score of neurons.

    ``masked``: all neurons of a layer, or of the model, are ranked together; the lowest become zero. ``uniform``: every
    routed expert keeps its own best, the same number everywhere. ``per_layer``: the same number within each layer, and
    the layers' numbers are those that lose the least score.

    Args:
        task: what to plan; its share is that of the neurons.
        method: name of the score in the step.
        scores: of all neurons.
        scope: what is ranked together, and whose sums are compared.
        multiple: what widths are a multiple of (forms uniform and per_layer).
        weigh: what makes layers comparable in form per_layer, see :func:`planner.probes.layer_weights`. Scores that are
            ranked over the model are comparable as they are.
        unit: of the score.
        notes: of the scores.

    Raises:
        PlanError: a share that removes nothing or everything, or more protected neurons than may stay.
    """
    if multiple < 1:
        raise PlanError(f"multiple {multiple} is no number of neurons: give 1 or more, such as 64")
    width = None
    if task.form == "masked":
        masks = _masked(task, scores, scope)
    elif task.form == "uniform":
        masks, width = _uniform(task, scores, multiple)
    else:
        weights = {shape.layer: 1.0 for shape in task.layers}
        if scope == "layer":
            weights, note = layer_weights(task, weigh)
            notes = (*notes, note)
        masks = _per_layer(task, scores, scope, multiple, weights)
    total = sum(float(one.flat.sum()) for one in scores.values())
    kept = sum(float(one.flat[masks[key]].sum()) for key, one in scores.items())
    mass = kept / total if total > 0 else None
    layers = [_layer(shape, masks[shape.key], whole=width is not None) for shape in task.layers]
    return Draft(
        steps=(
            SlimStep(method=method, form=task.form, width=width, layers=tuple(one for one in layers if one.experts)),  # type: ignore[arg-type]
        ),
        score=method,
        unit=f"{unit}, summed over the expert's neurons",
        values={key: rounded(one.routed.sum(1)) for key, one in scores.items()},
        kept_mass=mass,
        notes=(*notes, *_told(task, scores, scope, masks, mass)),
    )


def _masked(task: Task, scores: Neurons, scope: Scope) -> dict[LayerKey, Mask]:
    """(layer, step) -> mask of all its neurons: routed experts after one another, then shared ones."""
    open_to_cut = {shape.key: _open(task, shape, scores[shape.key]) for shape in task.layers}
    chunks = [[shape.key for shape in task.layers]] if scope == "model" else [[shape.key] for shape in task.layers]
    masks: dict[LayerKey, Mask] = {}
    for keys in chunks:
        values = np.concatenate([scores[key].flat for key in keys])
        free = np.concatenate([open_to_cut[key] for key in keys])
        count = part(len(values), task.share)
        where = "the model" if scope == "model" else f"layer {keys[0][0]}"
        if count < 1:
            raise PlanError(f"share {task.share:g} of {len(values)} neurons of {where} removes none: ask for more")
        if count > free.sum():
            raise PlanError(
                f"super experts hold {int((~free).sum())} of {len(values)} neurons of {where}, so that at most"
                f" {int(free.sum())} can go and not {count}: lower the share, or plan without the guard"
            )
        kept = np.ones(len(values), dtype=bool)
        kept[_order(np.where(free, values, np.inf))[:count]] = False
        masks |= dict(zip(keys, np.split(kept, np.cumsum([len(scores[key].flat) for key in keys])[:-1]), strict=True))
    return masks


def _uniform(task: Task, scores: Neurons, multiple: int) -> tuple[dict[LayerKey, Mask], int]:
    widths = {shape.width for shape in task.layers}
    if len(widths) > 1:
        raise PlanError(
            f"the experts of {task.source.model} have {min(widths)} to {max(widths)} neurons by layer, which form"
            " uniform would make one number: use form per_layer"
        )
    width = widths.pop()
    kept = multiple * -(-(width - part(width, task.share)) // multiple)
    _refuse_width(task, width, kept, multiple)
    return {shape.key: _best(scores[shape.key], kept) for shape in task.layers}, kept


def _per_layer(
    task: Task, scores: Neurons, scope: Scope, multiple: int, weights: dict[int, float]
) -> dict[LayerKey, Mask]:
    units, costs, asked = [], [], 0.0
    for shape in task.layers:
        one = scores[shape.key].routed
        unit = multiple * max(1, math.ceil(shape.width / multiple / STEPS))
        units.append(unit)
        asked += shape.width * task.share / unit
        lost = np.cumsum(np.concatenate([[0.0], np.sort(one, axis=1).sum(0)]))
        total = 1.0 if scope == "model" else float(one.sum()) or 1.0
        # Where a super expert keeps all its neurons, the layer is stored as wide as it was: it gives nothing.
        most = 0 if task.guard.experts(shape.key) else (shape.width - multiple) // unit
        costs.append(lost[: most * unit + 1 : unit] / total * weights[shape.layer])
    wanted = part(1, asked)
    if wanted < 1:
        shape = task.layers[0]
        _refuse_width(task, shape.width, shape.width, multiple)
    try:
        given = allocate(costs, wanted)
    except PlanError as error:
        raise PlanError(
            f"share {task.share:g} asks for more neurons than the layers without super experts have: {error}"
        ) from error
    return {
        shape.key: _best(scores[shape.key], shape.width - number * unit)
        for shape, number, unit in zip(task.layers, given, units, strict=True)
    }


def _refuse_width(task: Task, width: int, kept: int, multiple: int) -> None:
    asked = f"share {task.share:g} of {width} neurons per expert"
    if kept >= width:
        least = (width % multiple or multiple) / width
        raise PlanError(f"{asked} removes none in multiples of {multiple}: ask for at least {least:.4g}")
    if kept < 1:
        raise PlanError(f"{asked} leaves none: ask for less")


def _best(scores: LayerNeurons, kept: int) -> Mask:
    """Mask of a layer's neurons where every routed expert keeps its best; shared experts keep all."""
    mask = np.ones(scores.routed.shape, dtype=bool)
    for expert, values in enumerate(scores.routed):
        mask[expert, _order(values)[: len(values) - kept]] = False
    return np.concatenate([mask.ravel(), np.ones(len(scores.shared), dtype=bool)])


def _order(values: Array) -> NDArray[np.int64]:
    """Places from the lowest value up; of equal values the higher place first."""
    return len(values) - 1 - np.argsort(values[::-1], kind="stable")


def _open(task: Task, shape: LayerShape, scores: LayerNeurons) -> Mask:
    """Which of a layer's neurons may go."""
    free = np.ones(scores.routed.shape, dtype=bool)
    free[list(task.guard.experts(shape.key))] = False
    shared = np.full(len(scores.shared), not task.guard.experts(shape.key, "shared"))
    return np.concatenate([free.ravel(), shared])


def _layer(shape: LayerShape, mask: Mask, *, whole: bool) -> SlimLayer:
    """The entry of a layer; experts that keep all are named only where all have to be."""
    routed = mask[: shape.num_experts * shape.width].reshape(shape.num_experts, shape.width)
    shared = mask[shape.num_experts * shape.width :]
    experts = [SlimExpert.of(expert=expert, mask=one) for expert, one in enumerate(routed) if whole or not one.all()]
    if len(shared) and not shared.all():
        experts.append(SlimExpert.of(expert=0, mask=shared, role="shared"))
    return SlimLayer(layer=shape.layer, step=shape.step, experts=tuple(experts))


def _told(task: Task, scores: Neurons, scope: Scope, masks: dict[LayerKey, Mask], mass: float | None) -> list[str]:
    notes = []
    if task.form != "masked" and mass is not None:
        free = _ranked_together(scores, scope, masks)
        together = "the model" if scope == "model" else "a layer"
        notes.append(
            f"Form {task.form} keeps {mass:.3f} of the score; as many neurons, ranked together over {together} as"
            f" published, would keep {free:.3f}, so that {max(free - mass, 0.0):.3f} is lost to the form."
        )
    if task.form == "uniform" and task.guard.protected:
        notes.append("Super experts lose neurons too: form uniform can spare none.")
    if task.form == "per_layer" and task.guard.layers:
        notes.append("Layers with a super expert keep all their neurons.")
    return notes


def _ranked_together(scores: Neurons, scope: Scope, masks: dict[LayerKey, Mask]) -> float:
    """Part of the score that as many neurons keep where they are ranked over layer or model."""
    chunks = [list(scores)] if scope == "model" else [[key] for key in scores]
    kept = 0.0
    for keys in chunks:
        values = np.sort(np.concatenate([scores[key].flat for key in keys]))
        gone = int(sum((~masks[key]).sum() for key in keys))
        kept += float(values[gone:].sum())
    return kept / sum(float(one.flat.sum()) for one in scores.values())
