"""What a run says of room to cut: how much each layer does, how concentrated its width is, and for which domain."""

from __future__ import annotations

from typing import Literal

import polars as pl

import store
from moescope.errors import PlanError
from planner.importance.registry import find
from planner.importance.statistics import Statistics
from planner.task import Task

Weigh = Literal["influence", "equal"]
"""What a share of a layer's score costs where layers compete: that share times how far the layer's experts turn the
residual stream, or the share itself."""


def layer_weights(task: Task, weigh: Weigh) -> tuple[dict[int, float], str]:
    """How much each MoE layer counts where layers compete for a budget, and what to note.

    A layer that hardly turns the residual stream can lose most of its experts at little cost; shares of layers alone do
    not see that. The weight is :func:`depth_probe`'s moe_influence, the mean over the task's domains; where the run
    does not know it for every layer, all count alike, and the note says so. Ours.

    Raises:
        PlanError: another word.
    """
    if weigh not in ("influence", "equal"):
        raise PlanError(f"weigh {weigh!r} is not known: use influence or equal")
    equal = {shape.layer: 1.0 for shape in task.layers}
    if weigh == "equal":
        return equal, "Layers count alike: each by its share of its own score."
    try:
        probed = depth_probe(task.run).filter(pl.col("domain").is_in(task.domains))
    except PlanError:
        probed = pl.DataFrame(schema={"layer": pl.Int32, "moe_influence": pl.Float64})
    known = probed.filter(pl.col("layer").is_in(list(equal)))
    means = dict(known.group_by("layer").agg(pl.col("moe_influence").mean()).sort("layer").iter_rows())
    if set(means) != set(equal) or known["moe_influence"].null_count():
        return equal, "Layers count alike: the run does not know how far each turns the residual stream."
    return means, "Layers count by how far their experts turn the residual stream (1 - cosine, mean over domains)."


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
