"""Depth: decoder layers, or MoE blocks, that change the residual stream least.

Source: ShortGPT (arXiv 2403.03853), block influence = 1 - mean cosine of what enters a layer and what leaves it. It
takes one text; here every domain is looked at by itself and the one that the layer matters most to counts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

from compressor.plan import DropStep
from moescope.errors import PlanError
from planner.allocation import part
from planner.probes import depth_probe, width_probe
from planner.task import Draft, Task, rounded

__all__ = ["depth_probe", "draft", "width_probe"]


def draft(task: Task, *, what: Literal["layers", "blocks"] = "layers") -> Draft:
    """The decoder layers, or MoE blocks, of least influence go; those that hold a super expert stay.

    Args:
        task: what to plan; its share is that of the decoder layers or MoE blocks.
        what: ``layers`` = whole decoder layers, attention included; ``blocks`` = only the MoE block is silenced, and
            nothing is saved.

    Raises:
        PlanError: the run lacks the residual stream, or the share cannot be met.
    """
    if what not in ("layers", "blocks"):
        raise PlanError(f"what {what!r} is not known: use layers or blocks")
    column = "influence" if what == "layers" else "moe_influence"
    probed = depth_probe(task.run).filter(pl.col("domain").is_in(task.domains) & pl.col(column).is_not_null())
    worst = probed.group_by("layer").agg(pl.col(column).max()).sort("layer")
    influence = {layer: float(rounded(np.array(value))) for layer, value in worst.iter_rows()}
    expected = range(task.source.num_layers) if what == "layers" else sorted({one.layer for one in task.layers})
    unseen = [layer for layer in expected if layer not in influence]
    if unseen:
        raise PlanError(
            f"run {task.run.name!r} did not see what layer {unseen[0]} does to the residual stream, so {what} cannot be"
            " ranked: use another preset"
        )
    gone = tuple(sorted(_least(task, influence, what)))
    step = DropStep(method="block_influence", decoder_layers=gone)
    if what == "blocks":
        step = DropStep(method="moe_blocks", blocks=gone)
    return Draft(
        steps=(step,),
        score="block influence" if what == "layers" else "MoE block influence",
        unit="1 - cosine, one value per layer, the largest over domains",
        values={(layer, 0): np.array([influence[layer]]) for layer in expected},
        notes=tuple(_notes(what, probed, column, gone)),
    )


def _least(task: Task, influence: dict[int, float], what: str) -> list[int]:
    candidates = sorted(influence) if what == "layers" else sorted({one.layer for one in task.layers})
    count = part(len(candidates), task.share)
    if count < 1:
        raise PlanError(
            f"share {task.share:g} of {len(candidates)} {what} removes none: ask for at least {1 / len(candidates):.4g}"
        )
    free = [layer for layer in candidates if layer not in task.guard.layers]
    if count > len(free):
        raise PlanError(
            f"{len(candidates) - len(free)} of {len(candidates)} {what} hold super experts, so that at most"
            f" {len(free)} can go and not {count}: lower the share, or plan without the guard"
        )
    return sorted(free, key=lambda layer: (influence[layer], -layer))[:count]


def _notes(what: str, probed: pl.DataFrame, column: str, gone: tuple[int, ...]) -> list[str]:
    worst = probed.filter(pl.col("layer").is_in(gone)).sort(column, descending=True).head(1)
    layer, domain = worst.select("layer", "domain").row(0)
    notes = [f"Of what goes, layer {layer} matters most, to domain {domain}."]
    if what == "layers":
        notes.append("The estimate counts the experts only; attention and dense parts of these layers go as well.")
    else:
        notes.append("Shapes stay, so nothing is saved; influence is that of the routed experts.")
    return notes
