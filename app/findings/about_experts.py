"""Findings about experts: those that feed massive activations, those that are alike, and what scores agree on."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

import store
from app.exhibits.exhibit import Frames
from app.findings.finding import Evidence, Finding, Tone, listed
from app.frames import super_experts as frames_of_super_experts
from app.frames.axes import layer_label
from moescope.errors import PlanError
from planner.importance import find, score
from profiler.headline.similarity_kinds import BY_NAME, SimilarityTables, chance
from profiler.metrics.agreement import chance_band, score_agreement
from profiler.metrics.similarity import redundancy as redundancy_of

_NEAR = 0.9
"""Similarity from which two experts count as near copies."""

_LAYERS = 12
"""Layers whose matrices of similarity are read: more would make the findings slow on deep models."""

_SAME = {
    "output_cosine": "outputs on the same tokens", "gated_output": "weighted outputs", "weight": "weights",
    "router_row": "router rows",
}  # fmt: skip
"""Kinds of similarity, the strongest evidence first, and what they compare."""

_ALIKE = {
    "kind": pl.String, "label": pl.String, "pairs": pl.Int64, "mean": pl.Float64, "largest": pl.Float64,
    "expert": pl.Int64, "other": pl.Int64, "near": pl.Int64, "chance": pl.Float64,
}  # fmt: skip


def super_experts(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether experts stand out by the published rule, and by how much."""
    if "outputs" in run.omissions:
        return [_unknown("Super experts", "there are super experts", run.omissions["outputs"])]
    if "activations" not in run.info.levels:
        return [_unknown("Super experts", "there are super experts", "outputs were not recorded (level activations)")]
    limits = frames(frames_of_super_experts.thresholds, run)
    limit = {rule: value for rule, tokens, value in limits.iter_rows() if tokens == "all"}
    if "paper" not in limit:
        return [Finding("Super experts", "The verdict on super experts comes when the run is finished",
                        tone="unknown")]  # fmt: skip
    found = frames(frames_of_super_experts.super_experts, run).filter(pl.col("tokens") == "all")
    paper, code = (found.filter(pl.col("rule") == rule) for rule in ("paper", "code"))
    answer, more = _super_experts(paper, code)
    proof = [Evidence("super experts by the paper's rule", float(len(paper)), form="count", source="super_experts",
                      exhibit="outputs")]  # fmt: skip
    where: dict[str, Any] = {}
    for row in frames(frames_of_super_experts.output_maxima, run).head(1).iter_rows(named=True):
        name = f"largest |output|, layer {row['label']}, {'shared ' if row['kind'] == 'shared' else ''}expert"
        proof.insert(0, Evidence(f"{name} {row['expert']}", row["value"], control=limit["paper"],
                                 control_is="rule, where massive activations form", source="table expert_output",
                                 exhibit="outputs"))  # fmt: skip
        where = {"layer": row["label"], "expert": row["expert"] if row["kind"] == "routed" else None}
        if paper.is_empty() and limit["paper"] is not None and row["value"] > limit["paper"]:
            more.append(
                "The largest output exceeds what the rule asks for, but no massive activation forms in its layer."
            )
    massive = frames(frames_of_super_experts.residual, run).filter("massive")["layer"].to_list()
    if massive:
        more.append(
            f"Massive activations stand in the residual stream of layers {listed([str(one) for one in massive])}."
        )
    tone: Tone = "attention" if len(paper) else "plain"
    return [Finding("Super experts", answer, " ".join(more), tuple(proof), tone, page="Super experts", **where)]


def redundancy(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether experts are near copies of each other, by the strongest kind of similarity that the run has."""
    found = frames(alike, run)
    if found.is_empty():
        reason = run.omissions.get("outputs", "similarity was not recorded (level similarity)")
        return [_unknown("Redundancy", "experts are alike", reason)]
    return [_redundancy(found, layers=len(run.layers))]


def alike(run: store.Run) -> pl.DataFrame:
    """How alike experts are by the first of :data:`_SAME` that the run has, one row per MoE layer: kind, label, pairs,
    mean, largest with its two experts, near = pairs above 0.9, chance. Of deep models, some layers evenly apart."""
    places = sorted({round(at) for at in np.linspace(0, len(run.layers) - 1, min(len(run.layers), _LAYERS))})
    rows = []
    for kind in _SAME:
        for layer in (run.layers[at] for at in places if run.layers):
            key, tables = (layer.layer, layer.step), SimilarityTables(run, layer=layer.layer)
            matrix = BY_NAME[kind].read(tables, key)
            if matrix is not None:
                found = redundancy_of(similarity=matrix)
                rows.append((kind, layer_label(*key), found.pairs, found.mean, found.largest, found.first, found.second,
                             int(found.above[-1]), chance(tables, kind, key)))  # fmt: skip
        if rows:
            break
    return pl.DataFrame(rows, schema=_ALIKE, orient="row").filter(pl.col("pairs") > 0)


def title(kind: str) -> str:
    """What a kind of similarity compares, in words."""
    return _SAME[kind]


def importance(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether the cheap score, how often an expert is used, would cut the same experts as what it puts out."""
    names = ["frequency"]
    scores = []
    try:
        scores.append(_routed(run, "frequency"))
        for name in ("reap", "ean", "gate_mass"):
            try:
                scores.append(_routed(run, name))
            except PlanError:
                continue
            names.append(name)
            break
    except PlanError:
        return []
    if len(names) < 2:
        return []
    joined = scores[0].join(scores[1], on=["layer", "step", "expert"], suffix="_other").sort("layer", "step", "expert")
    sizes, measured = [], []
    for _, part in joined.group_by("layer", "step", maintain_order=True):
        values = part.select("value", "value_other").to_numpy().T
        if len(part) > 1 and np.isfinite(values).all() and (np.ptp(values, axis=1) > 0).all():
            found = score_agreement(scores=values, shares=(0.25,))
            measured.append((float(found.spearman[0, 1]), float(found.overlap[0][0, 1])))
            sizes.append(len(part))
    if not measured:
        return []
    spearman, overlap = (float(mean) for mean in np.mean(measured, axis=0))
    band = chance_band(num_experts=sizes, measure="spearman", num_draws=400)
    by_lot = float(np.mean([max(size // 4, 1) / size for size in sizes]))
    other = find(names[1]).title
    other = other if other.isupper() else other.lower()
    verdict = "nearly the same" if overlap > 0.9 else "largely the same" if overlap > 0.6 else "different"
    answer = f"Frequency and {other} would cut {verdict} experts: {overlap:.0%} of the lowest quarter are in common"
    more = ""
    if overlap <= 0.6:
        more = "The choice of the score is a decision, and only damage measured after the cut settles it."
    return [Finding("Importance", answer, more, (
        Evidence(f"lowest quarter in common, frequency and {other}", overlap, control=by_lot,
                 control_is="random rankings", form="share", source="table expert_load, expert_output",
                 exhibit="score-agreement"),
        Evidence("rank correlation (Spearman), mean of layers", spearman, control=float(band.high),
                 control_is="random rankings, 97.5 %", source="planner.importance",
                 exhibit="score-agreement"),
    ), page="Overview")]  # fmt: skip


def _super_experts(paper: pl.DataFrame, code: pl.DataFrame) -> tuple[str, list[str]]:
    """The answer, and what else there is to say."""
    if len(paper):
        names = listed([f"({layer}, {expert})" for layer, expert in paper.select("layer", "expert").iter_rows()])
        answer = f"{len(paper)} super expert{'s' if len(paper) > 1 else ''}, as (layer, expert): {names}"
        return answer, ["No plan should touch them: removing them can break the model."]
    if len(code):
        named = f"{len(code)} expert{'s' if len(code) > 1 else ''}"
        return "No super expert by the paper's rule", [f"The looser rule of its code names {named}."]
    return "No super expert: no output stands out by the published rules", []


def _unknown(subject: str, what: str, reason: str) -> Finding:
    return Finding(subject, f"Whether {what} cannot be said: {reason.rstrip('.')}", tone="unknown")


def _redundancy(found: pl.DataFrame, *, layers: int) -> Finding:
    kind, compared = found["kind"][0], title(found["kind"][0])
    pairs, near = int(found["pairs"].sum()), int(found["near"].sum())
    mean = float((found["mean"] * found["pairs"]).sum() / max(pairs, 1))
    top = found.sort("largest", descending=True, nulls_last=True).row(0, named=True)
    chances = found["chance"].drop_nulls()
    random = float(chances.to_numpy().mean()) if len(chances) else None
    part = "" if len(found) == layers else f" in {len(found)} of {layers} layers"
    pair = f"{top['expert']} and {top['other']} of layer {top['label']}"
    more = ""
    if near:
        answer = f"{near:,} of {pairs:,} pairs of experts{part} are near copies by their {compared}: nearest {pair}"
    else:
        answer = f"No two experts{part} are near copies: {pair} come nearest"
        more = f"By their {compared}, these two reach {top['largest']:.2f}. Merging any two loses something."
    source = BY_NAME[kind].metric
    return Finding("Redundancy", answer, more, (
        Evidence("similarity of these two", top["largest"], control=random, control_is="random vectors, without sign",
                 source=source, exhibit="similarity-over-layers"),
        Evidence("mean of pairs", mean, control=random, control_is="random vectors, without sign", source=source,
                 exhibit="similarity-over-layers"),
        Evidence(f"pairs above {_NEAR}", float(near), control=float(pairs), control_is="pairs in all", form="count",
                 source=source, exhibit="similarity-over-layers"),
    ), page="Similarity", layer=top["label"], expert=top["expert"])  # fmt: skip


def _routed(run: store.Run, name: str) -> pl.DataFrame:
    return score(run, name).filter(pl.col("kind") == "routed").select("layer", "step", "expert", "value")
