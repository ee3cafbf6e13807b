"""Depth: decoder layers, or MoE blocks, that change the residual stream least.

Source: ShortGPT (arXiv 2403.03853), block influence = 1 - mean cosine of what enters a layer and what leaves it. It
takes one text; here every domain is looked at by itself and the one that the layer matters most to counts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import polars as pl

import store
from compressor.plan import DropStep
from moescope.errors import PlanError
from planner.allocation import part
from planner.importance.registry import find
from planner.importance.statistics import Statistics
from planner.task import Draft, Task, rounded


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


def depth_probe(run: store.Run) -> pl.DataFrame:
    """How far each decoder layer turns the residual stream, domain by domain.

    Columns: layer, domain, tokens; influence = 1 - mean cosine of what enters and leaves the layer; moe_influence = 1 -
    mean cos(r, r + y), y the routed experts' sum (shared experts are not in it), null in dense layers and where r was
    not seen for every token.

    Raises:
        PlanError: the run has no residual stream.
    """
    table = run.table("residual").filter(pl.col("input_cosine_sum").is_not_null())
    if table.is_empty():
        raise PlanError(f"run {run.name!r} has no residual.input_cosine_sum: collect it with --level activations")
    keys = ["layer", "domain"]
    whole = table.group_by(keys).agg(pl.col("tokens", "input_cosine_sum").sum())
    whole = whole.with_columns(influence=1 - pl.col("input_cosine_sum") / pl.col("tokens"))
    blocks = run.table("moe_output").filter(pl.col("cosine_sum").is_not_null())
    blocks = blocks.group_by(keys).agg(pl.col("tokens", "residual_tokens", "cosine_sum").sum())
    seen = (pl.col("residual_tokens") > 0) & (pl.col("residual_tokens") == pl.col("tokens"))
    moe = blocks.select(*keys, moe_influence=pl.when(seen).then(1 - pl.col("cosine_sum") / pl.col("residual_tokens")))
    return whole.join(moe, on=keys, how="left").select(*keys, "tokens", "influence", "moe_influence").sort(keys)


def width_probe(run: store.Run) -> pl.DataFrame:
    """How much of each MoE layer's width score sits in few neurons: is there room to slim it, and for which domain?

    The width score is SparseUnifiedModel's (arXiv 2512.02351). Columns: layer, step, domain (empty where vectors are
    pooled over domains); quarter, half, most = part of the layer's score that its strongest 25, 50 and 75 % of neurons
    hold, 0..1; neurons.

    Raises:
        PlanError: the run was not collected at level activations.
    """
    one = find("width")
    domains: list[str | None] = sorted(run.table("neuron_activation")["domain"].unique().to_list())
    frames = []
    for domain in domains or [None]:
        scores = one.function(Statistics(run, level=one.level, domain=domain or None))
        ordered = scores.filter(pl.col("kind") == "routed").sort("value", descending=True)
        held = [
            (pl.col("value").head((pl.len() * share).ceil().cast(pl.Int64)).sum() / pl.col("value").sum()).alias(name)
            for name, share in (("quarter", 0.25), ("half", 0.5), ("most", 0.75))
        ]
        by_layer = ordered.group_by("layer", "step", maintain_order=True).agg(*held, neurons=pl.len().cast(pl.Int64))
        frames.append(by_layer.with_columns(domain=pl.lit(domain or "")))
    columns = ["layer", "step", "domain", "quarter", "half", "most", "neurons"]
    return pl.concat(frames).select(columns).sort("layer", "step", "domain")


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
