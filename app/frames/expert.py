"""One expert: key figures, domains, neighbours, outliers, importance and ablations. Its tokens: ``expert_tokens``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

import store
from app.frames import ablation, super_experts
from app.frames.axes import parse_layer
from app.frames.expert_trace import expert_blocks, layer_info
from app.frames.load import expert_load
from profiler.headline.similarity_kinds import SimilarityTables, layer_matrices


def of_layer(run: store.Run, *, label: str) -> pl.DataFrame:
    """One row per routed expert of a layer: expert, tokens that used it, share of the layer's selections, relative =
    share over that of a balanced router, place by load (1 = the most used; of equal ones the lower number first).
    """
    layer = layer_info(run, label)
    load = expert_load(run, layer=layer)
    place = pl.col("tokens").rank("ordinal", descending=True).cast(pl.Int64)
    return load.sort("expert").select("expert", "tokens", "share", "relative", place.alias("place"))


def notable(run: store.Run, *, label: str) -> pl.DataFrame:
    """The experts of a layer that one asks for first, one row each: what, expert, detail.

    The most and the least used; the most and the least important by the best score that the run can give; the one with
    the largest output. Empty where nothing was counted in the layer.
    """
    load = of_layer(run, label=label)
    rows: list[tuple[str, int, str]] = []
    if load["tokens"].sum():
        for what, row in (("most used", load.sort("place").row(0)), ("least used", load.sort("place").row(-1))):
            rows.append((what, row[0], f"{row[1]:,} tokens, {row[3]:.2f} × a balanced router's load"))
        rows += _important(run, label)
    layer, step = parse_layer(label)
    maxima = super_experts.output_maxima(run).filter((pl.col("kind") == "routed") & (pl.col("layer") == layer))
    maxima = maxima.filter(pl.col("step") == step)
    if len(maxima):
        top = maxima.row(0, named=True)
        what = "super expert" if top["paper"] else "largest output"
        rows.append((what, top["expert"], f"largest |output| {top['value']:,.3g}"))
    return pl.DataFrame(rows, schema={"what": pl.String, "expert": pl.Int64, "detail": pl.String}, orient="row")


def _important(run: store.Run, label: str) -> list[tuple[str, int, str]]:
    """The most and the least important expert by the first score of ``_BEST`` that the run can give."""
    from moescope.errors import PlanError
    from planner.importance import find, score

    layer, step = parse_layer(label)
    for name in _BEST:
        try:
            values = score(run, name)
        except PlanError:  # the run lacks what the score rests on
            continue
        mine = (pl.col("layer") == layer) & (pl.col("step") == step) & (pl.col("kind") == "routed")
        ranked = values.filter(mine & pl.col("value").is_finite()).sort("value", "expert", descending=[True, False])
        if len(ranked):
            first, last = ranked["expert"][0], ranked["expert"][-1]
            words = find(name).title
            return [("most important", first, f"by {words}"), ("least important", last, f"by {words}")]
    return []


def figures(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """Key figures of one expert, one row each: figure, value, low, high, beside = what the layer's experts have in the
    mean, chance = what an even router, or shuffled text, gives them (null where nobody knows), tokens that it rests on.
    """
    layer = layer_info(run, label, expert)
    load = expert_load(run, layer=layer)
    routed = _routed_tokens(run, layer)
    wanted = {
        "share of tokens": (pl.col("tokens") / routed, layer.top_k / layer.num_experts),
        "first choice among its tokens": (pl.col("first_choices") / pl.col("tokens"), 1 / layer.top_k),
        "share of gate weight": (pl.col("gate_share"), 1 / layer.num_experts),
    }
    if "weights" in run.omissions:
        wanted.pop("share of gate weight")
    if "order" in run.omissions:
        wanted.pop("first choice among its tokens")
    rows: list[dict[str, Any]] = []
    for name, (value, even) in wanted.items() if routed else ():
        each = load.select(value.cast(pl.Float64).fill_nan(None).alias("value"), "expert")
        mine = each.filter(pl.col("expert") == expert)["value"][0]
        if mine is not None:
            row = {"figure": name, "value": mine, "beside": each["value"].mean(), "chance": even}
            rows.append({**row, "tokens": routed})
    return pl.DataFrame(rows + _metric_rows(run, layer, expert), schema=_FIGURES)


def domain_load(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """One row per domain: domain, tokens, selections, share = selections / tokens with low and high, ratio to the
    expert's share of all text, pooled = that share, even = k / E, sequences.

    95 % intervals over sequences, where there is a trace: of long ones it reads a part, and says of how many tokens.
    """
    layer = layer_info(run, label, expert)
    counts = _traced_domains(run, label, expert) if run.has_trace else _counted_domains(run, layer, expert)
    pooled = pl.col("selections").sum() / pl.col("tokens").sum()
    reach = 1.96 * pl.col("error")
    return (
        counts.filter(pl.col("tokens") > 0)
        .with_columns((pl.col("selections") / pl.col("tokens")).alias("share"), pooled.alias("pooled"))
        .with_columns(
            (pl.col("share") - reach).clip(0, 1).alias("low"),
            (pl.col("share") + reach).clip(0, 1).alias("high"),
            pl.when(pl.col("pooled") > 0).then(pl.col("share") / pl.col("pooled")).alias("ratio"),
            pl.lit(layer.top_k / layer.num_experts).alias("even"),
        )
        .select(_DOMAINS)
        .sort(["share", "domain"], descending=[True, False])
    )


def partners(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """One row per other expert of the layer: how often both are used, and how alike they are.

    Columns: other; joint_tokens = tokens that use both; given = share of the expert's tokens that use the other too;
    lift = given over what the other's popularity alone gives, (k - 1) of the selections of the others; then one column
    per kind of similarity that the run has. Sorted by lift.
    """
    layer = layer_info(run, label, expert)
    key = (layer.layer, layer.step)
    tables = SimilarityTables(run, layer=layer.layer)
    columns: dict[str, Any] = {"other": np.arange(layer.num_experts)}
    joint = tables.sums("expert_pair", "selections", key)
    together = np.nan_to_num(joint[expert]) if joint is not None else _traced_partners(run, label, expert)
    if together is not None:
        columns |= _co_activation(run, layer, expert, together)
    columns |= {kind: matrix[expert] for kind, matrix in layer_matrices(tables, key, parts=False).items()}
    frame = pl.DataFrame(columns).fill_nan(None).filter(pl.col("other") != expert)
    return (
        frame.sort("lift", descending=True, nulls_last=True, maintain_order=True) if "lift" in frame.columns else frame
    )


def outliers(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """The expert's largest output over all tokens, one row: value, layer_rank and rank (1 = the largest of the layer's
    and of all routed experts), of_layer, of, where it stood (channel, sequence, position), paper, code = whether that
    rule calls it a super expert. Empty where no output was recorded.
    """
    layer, step = parse_layer(label)
    frame = super_experts.output_maxima(run).filter(pl.col("kind") == "routed")
    of_layer = (pl.col("layer") == layer) & (pl.col("step") == step)
    largest = pl.col("value").rank("min", descending=True)
    frame = frame.with_columns(
        largest.cast(pl.Int64).alias("rank"), pl.len().alias("of"),
        largest.over("layer", "step").cast(pl.Int64).alias("layer_rank"),
        pl.len().over("layer", "step").alias("of_layer"),
    )  # fmt: skip
    columns = ["value", "layer_rank", "of_layer", "rank", "of", "channel", "sequence", "position", "paper", "code"]
    return frame.filter(of_layer & (pl.col("expert") == expert)).select(columns)


def importance(run: store.Run) -> pl.DataFrame:
    """Every score of whole experts that the run can give: score, title, layer, step, expert, value, unit, rank (1 = the
    most important of its layer), of = experts of the layer that are scored.
    """
    from moescope.errors import PlanError
    from planner.importance import SCORES, score

    parts = []
    for one in SCORES:
        if one.granularity != "expert":
            continue
        try:
            found = score(run, one.name)
        except PlanError:  # the run lacks what the score rests on
            continue
        ranked = found.filter(pl.col("kind") == "routed").with_columns(
            pl.lit(one.name).alias("score"), pl.lit(one.title).alias("title"), pl.lit(one.unit).alias("unit"),
            pl.col("value").rank("min", descending=True).over("layer", "step").cast(pl.Int64).alias("rank"),
            pl.len().over("layer", "step").cast(pl.Int64).alias("of"),
        )  # fmt: skip
        parts.append(ranked.select(list(_IMPORTANCE)))
    return pl.concat(parts) if parts else pl.DataFrame(schema=_IMPORTANCE)


def importance_of(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """The rows of :func:`importance` of one expert: score, title, value, unit, rank, of."""
    return of_expert(importance(run), label=label, expert=expert)


def of_expert(frame: pl.DataFrame, *, label: str, expert: int) -> pl.DataFrame:
    """The rows of one expert, without the columns that name it."""
    layer, step = parse_layer(label)
    mine = (pl.col("layer") == layer) & (pl.col("step") == step) & (pl.col("expert") == expert)
    return frame.filter(mine).drop("layer", "step", "expert")


def ablations(run: store.Run, *, label: str, expert: int) -> pl.DataFrame:
    """What switching experts off did, of the ablations with this one among them: rows of ``ablation.passes``."""
    layer, step = parse_layer(label)
    wanted = {"layer": layer, "step": step, "kind": "routed", "expert": expert}
    found = [document for document in ablation.documents(run) if wanted in document.get("experts", [])]
    return pl.concat([ablation.passes(document) for document in found]) if found else ablation.ablations(run).clear()


def _metric_rows(run: store.Run, layer: store.LayerInfo, expert: int) -> list[dict[str, Any]]:
    """Figures that were computed when the collection ended."""
    rows = []
    for metric, (name, parameters, at) in _METRICS.items():
        metric = metric.partition(" ")[0]
        frame = run.metrics(metric).filter((pl.col("layer") == layer.layer) & (pl.col("step") == layer.step))
        if at is not None:
            frame = frame.filter(pl.col("at") == at)
        kept = [_says(text, parameters) for text in frame["parameters"].to_list()]
        frame = frame.filter(pl.Series(kept, dtype=pl.Boolean))
        each = frame.filter(pl.col("expert").is_not_null() & (pl.col("control") == "observed"))
        shuffled = frame.filter(pl.col("expert").is_null() & (pl.col("control") == "shuffled"))["value"]
        mine = each.filter(pl.col("expert") == expert)
        if not mine.is_empty():
            row = mine.select("value", "low", "high", "tokens").row(0, named=True)
            chance = shuffled[0] if len(shuffled) else None
            rows.append({"figure": name, "beside": each["value"].mean(), "chance": chance, **row})
    return rows


def _says(text: str | None, parameters: Mapping[str, str]) -> bool:
    found = json.loads(text or "{}")
    return all(found.get(name) == value for name, value in parameters.items())


def _routed_tokens(run: store.Run, layer: store.LayerInfo) -> int:
    """Tokens that the layer routed; where nobody counted them, selections over k."""
    routed = run.table("router_load", layer=layer.layer).filter(pl.col("step") == layer.step)
    if not routed.is_empty():
        return int(routed["tokens"].sum())
    load = run.table("expert_load", layer=layer.layer)
    counted = load.filter((pl.col("step") == layer.step) & (pl.col("kind") == "routed"))
    return int(counted["tokens"].sum()) // layer.top_k


def _traced_domains(run: store.Run, label: str, expert: int) -> pl.DataFrame:
    """Tokens and selections by domain, and the standard error of their ratio between sequences."""
    domain = dict(run.table("sequence").select("sequence", "domain").iter_rows())
    parts = []
    for block in expert_blocks(run, label=label, expert=expert):
        sums = np.add.reduceat(np.append(block.hit, False), block.offsets[:-1])
        tokens = np.diff(block.offsets)
        owners = [domain[number] for number in block.sequences.tolist()]
        parts.append(pl.DataFrame({"domain": owners, "n": tokens, "c": np.where(tokens > 0, sums, 0)}))
    frame = pl.concat(parts) if parts else pl.DataFrame(schema={"domain": pl.String, "n": pl.Int64, "c": pl.Int64})
    total_n, total_c = pl.col("n").sum(), pl.col("c").sum()
    rest = pl.col("c") - total_c / total_n * pl.col("n")
    count = pl.len()
    error = pl.when(count > 1).then((count / (count - 1) * (rest**2).sum()).sqrt() / total_n)
    return frame.group_by("domain").agg(
        total_n.alias("tokens"), total_c.cast(pl.Int64).alias("selections"), count.cast(pl.Int64).alias("sequences"),
        error.alias("error"),
    )  # fmt: skip


def _counted_domains(run: store.Run, layer: store.LayerInfo, expert: int) -> pl.DataFrame:
    """The same from counts alone, which have no sequences."""
    load = run.table("expert_load", layer=layer.layer)
    load = load.filter((pl.col("step") == layer.step) & (pl.col("kind") == "routed"))
    return load.group_by("domain").agg(
        (pl.col("tokens").sum() / layer.top_k).round().cast(pl.Int64).alias("tokens"),
        pl.col("tokens").filter(pl.col("expert") == expert).sum().cast(pl.Int64).alias("selections"),
        pl.lit(None, pl.Int64).alias("sequences"), pl.lit(None, pl.Float64).alias("error"),
    )  # fmt: skip


def _traced_partners(run: store.Run, label: str, expert: int) -> NDArray[np.float64] | None:
    """(experts,) tokens that use both, from the trace; None without one."""
    if not run.has_trace:
        return None
    together = np.zeros(layer_info(run, label, expert).num_experts)
    for block in expert_blocks(run, label=label, expert=expert):
        used = block.ids[block.hit]
        together += np.bincount(used[used >= 0], minlength=len(together))
    return together


def _co_activation(
    run: store.Run, layer: store.LayerInfo, expert: int, together: NDArray[np.float64]
) -> dict[str, NDArray[Any]]:
    load = expert_load(run, layer=layer)
    counts = load.sort("expert")["tokens"].to_numpy().astype(np.float64)
    others = np.where(np.arange(len(counts)) == expert, 0.0, counts)
    given = together / together[expert] if together[expert] else np.full(len(together), np.nan)
    expected = (layer.top_k - 1) * others / max(others.sum(), 1.0)
    lift = np.divide(given, expected, out=np.full(len(given), np.nan), where=expected > 0)
    return {"joint_tokens": together.astype(np.int64), "given": given, "lift": lift}


_BEST = ("reap", "ean", "gate_mass", "frequency")
"""Scores for a first look, the best-founded first."""

_METRICS: dict[str, tuple[str, dict[str, str], float | None]] = {
    "srp": ("SRP at segments of 16", {}, 16.0),
    "domain_variation": ("variation over domains", {}, None),
    "first_choice_vocabulary input": ("share of its own input tokens", {"tokens": "input"}, None),
    "first_choice_vocabulary predicted": ("share of its own predicted tokens", {"tokens": "predicted"}, None),
    "first_choice_vocabulary next": ("share of its own next tokens", {"tokens": "next"}, None),
}
_FIGURES = {"figure": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "beside": pl.Float64,
            "chance": pl.Float64, "tokens": pl.Int64}  # fmt: skip
_DOMAINS = ["domain", "tokens", "selections", "share", "low", "high", "ratio", "pooled", "even", "sequences"]
_IMPORTANCE = {"score": pl.String, "title": pl.String, "layer": pl.Int32, "step": pl.Int32, "expert": pl.Int32,
               "value": pl.Float64, "unit": pl.String, "rank": pl.Int64, "of": pl.Int64}  # fmt: skip
