"""Ternary: what if routed experts were ternary and shared ones stayed as they are (MoTE, arXiv 2506.14435).

MoTE trains such experts; rounding trained ones costs far more, and this says how much. Beside it stands what as many
bytes of whole experts would do.
"""

from __future__ import annotations

from typing import Unpack

import numpy as np

from compressor.plan import BITS, LayerKey
from moescope.errors import PlanError
from planner.grams import relative_error, total_gram
from planner.quantize.costs import told
from planner.quantize.errors import layer_errors
from planner.quantize.grid import Grid, groups_in_words
from planner.quantize.programme import Whole
from planner.quantize.units import Units, units_of
from planner.source import value_bytes
from planner.task import Draft, Task, rounded


def draft(task: Task, **grid: Unpack[Grid]) -> Draft:
    """Every routed expert becomes ternary; super experts stay as they are.

    Args:
        task: what to plan; its bits only bound.
        grid: see :class:`planner.quantize.grid.Grid`; shared experts stay as they are unless ``shared_bits`` is given.

    Raises:
        PlanError: a run without errors, or fewer bits than this takes.
    """
    own: Grid = {"shared_bits": None, **grid}
    units = units_of(task, widths=["ternary"], **own)
    source = 8 * (value_bytes(task.run) or 2)
    sizes = units.sizes[:, 0].copy()
    sizes[units.protected] = units.weights[units.protected] * source
    needed = units.effective(int(sizes.sum()))
    if needed > (task.bits or 0.0):
        raise PlanError(
            f"{task.bits or 0:g} bits per weight cannot be met: ternary experts in"
            f" {groups_in_words(units.grid.group_size)} take {needed:.4f} with what stays as it is"
        )
    errors, at = layer_errors(task), BITS.index("ternary")
    values = units.per_expert({key: one.errors["all"][:, at] for key, one in errors.items()})
    columns = np.zeros(len(units.units), dtype=np.int64)
    notes = [f"{needed:.4g} effective bits per weight.", *told(units, columns, errors)[1:]]
    return Draft(
        steps=(units.step("ternary", columns, whole=units.protected),),
        score="output error of ternary weights",
        unit="part of the squared outputs of the layer's experts",
        values={key: rounded(one) for key, one in values.items()},
        notes=(*notes, *_against_whole_experts(units, sizes, source)),
    )


def _against_whole_experts(units: Units, sizes: Whole, source: int) -> list[str]:
    """What whole experts of the same bytes would do, in a sentence."""
    task = units.task
    counts: dict[LayerKey, int] = {}
    per_layer = np.bincount(units.groups, weights=sizes)
    for (key, experts), size in zip(units.experts.items(), per_layer.tolist(), strict=True):
        one = int(units.weights[units.groups == len(counts)][0])
        counts[key] = min(int(size // (one * source)), len(experts))
    few = sorted(set(counts.values()))
    span = str(few[0]) if len(few) == 1 else f"{few[0]} to {few[-1]}"
    shapes = task.source.by_key
    short = " (fewer than a token uses)" if any(count < shapes[key].top_k for key, count in counts.items()) else ""
    sentence = f"As many bytes hold {span} whole experts per layer{short}"
    if task.before:
        return [f"{sentence}."]
    try:
        grams, _ = total_gram(task)
    except PlanError:
        return [f"{sentence}."]
    errors, at = layer_errors(task), BITS.index("ternary")
    whole, ternary = [], []
    for key, count in counts.items():
        gram = grams[key]
        kept = np.argsort(-np.diag(gram), kind="stable")[:count].tolist()
        whole.append(relative_error(gram, sorted(kept)))
        # Errors are parts of the experts' own squared outputs; as parts of their sum they compare.
        ternary.append(float(errors[key].errors["all"][:, at].sum()) * float(np.trace(gram)) / (gram.sum() or 1.0))
    return [
        f"{sentence}: those of most energy alone would change the layers' output by {np.mean(whole):.3f} of its squared"
        f" norm (mean over layers, before anything is routed anew), ternary ones by {np.mean(ternary):.3f}."
    ]
