"""Findings from what stands beside a run: studies of caching, plans, evaluations, ablations, recommendations."""

from __future__ import annotations

import polars as pl

import store
from app.exhibits.exhibit import Frames
from app.frames import ablation as frames_of_ablation
from app.frames import compress_measured, evaluation, recommendations
from app.report.finding import Evidence, Finding
from moescope.errors import PlanError, StoreError
from planner.cache.study import Study

_MOST = 4
"""Documents of a kind that are told of."""


def caching(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether caching experts pays on a machine, where that was asked."""
    found = []
    for path in store.list_plans(run.path, "caching")[:_MOST]:
        try:
            study = Study.of(store.read_plan_document(path))
        except (PlanError, StoreError) as error:
            found.append(Finding("Caching", f"A study beside the run cannot be read: {error}", tone="unknown"))
            continue
        proof = [Evidence("no way takes less, ms per token", study.bound_ms, source=path.name),
                 Evidence("all experts on the device, ms per token", study.resident_ms, source=path.name)]  # fmt: skip
        best = study.best
        proof.insert(0, Evidence(f"{best.title}, ms per token", best.ms, best.low, best.high, best.chance_ms,
                                 "the same on random experts", source=path.name))  # fmt: skip
        found.append(Finding("Caching", f"On {study.machine[1]}: {study.verdict.sentence.rstrip('.')}.", tuple(proof)))
    if found or not run.has_trace:
        return found
    sentence = "Whether caching pays in time depends on a machine, and no study stands beside this run: moescope cache"
    return [Finding("Caching", f"{sentence} makes one.", tone="unknown")]


def plans(run: store.Run, frames: Frames) -> list[Finding]:
    """What was planned for this model, and what following the plans cost."""
    if run.live:
        return []
    rows = frames(compress_measured.plans, run)
    found = [_plan(row) for row in rows.head(_MOST).iter_rows(named=True)]
    if len(rows) > _MOST:
        found.append(Finding("Plans", f"{len(rows) - _MOST} older plans stand beside the run too."))
    planned = set(rows["digest"].to_list())
    others = frames(evaluation.evaluations, run).filter(~pl.col("plan").fill_null("").is_in(list(planned)))
    found += [_evaluation(row) for row in others.head(_MOST).iter_rows(named=True)]
    for row in frames(recommendations.recommendations, run).head(1).iter_rows(named=True):
        proof = (Evidence("memory that was asked for", row["memory"], source=row["file"]),
                 Evidence("candidates", float(row["candidates"]), form="count", source=row["file"]))  # fmt: skip
        found.append(Finding("Plans", f"Newest recommendation: {row['verdict'].rstrip('.')}.", proof))
    sentence = "No plan and no evaluation stands beside this run: what cutting it would cost was not measured."
    return found or [Finding("Plans", sentence, tone="unknown")]


def ablations(run: store.Run, frames: Frames) -> list[Finding]:
    """What switching experts off did."""
    found = []
    for document in frames_of_ablation.documents(run)[:_MOST]:
        more, sentence, _ = frames_of_ablation.sentences(document)
        rows = frames_of_ablation.passes(document)
        ablated = rows.filter(pl.col("what") == "ablated").row(0, named=True)
        controls = rows.filter(~pl.col("what").is_in(["base", "ablated"]))["ratio"].drop_nulls()
        largest = float(controls.to_numpy().max()) if len(controls) else None
        names = frames_of_ablation.names(document["experts"])
        proof = (Evidence("perplexity against the whole model", ablated["ratio"], ablated["ratio_low"],
                          ablated["ratio_high"], largest, "worst of the controls", source="ablation",
                          exhibit="ablation"),)  # fmt: skip
        found.append(Finding("Experiments", f"Switched off {names}: {sentence.rstrip('.')}.", proof,
                             "attention" if more else "plain"))  # fmt: skip
    return found


def _plan(row: dict[str, object]) -> Finding:
    sentence = f"{row['plan']}: keeps {row['experts_after']:,} of {row['experts']:,} experts and saves {row['saved']}"
    if row["kl"] is None:
        return Finding("Plans", f"{sentence}; not measured yet.",
                       (Evidence("predicted weighed error", row["weighed_error"], source=str(row["file"])),))  # type: ignore[arg-type]  # fmt: skip
    sentence += f"; measured on {row['tokens']:,} tokens, perplexity is {row['ratio']:.3f} × the original's."
    return Finding("Plans", sentence, (
        Evidence("KL divergence, nats per token", row["kl"], control=0.0, control_is="the model as it was",  # type: ignore[arg-type]
                 source="evaluation", exhibit="compress-measured"),
        Evidence("perplexity ratio", row["ratio"], control=1.0, control_is="the model as it was",  # type: ignore[arg-type]
                 source="evaluation", exhibit="compress-measured"),
    ))  # fmt: skip


def _evaluation(row: dict[str, object]) -> Finding:
    sentence = f"{row['model']} against {row['base']}: perplexity {row['ratio']:.3f} × on {row['tokens']:,} tokens"
    sentence += "." if row["held_out"] else ", which were not held out."
    return Finding("Plans", sentence, (
        Evidence("KL divergence, nats per token", row["kl"], row["kl_low"], row["kl_high"], 0.0,  # type: ignore[arg-type]
                 "the base itself", source="evaluation", exhibit="compress-measured"),
        Evidence("perplexity ratio", row["ratio"], row["ratio_low"], row["ratio_high"], 1.0,  # type: ignore[arg-type]
                 "the base itself", source="evaluation", exhibit="compress-measured"),
    ))  # fmt: skip
