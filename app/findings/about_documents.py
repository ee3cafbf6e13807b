"""Findings from what stands beside a run: studies of caching, plans, evaluations, ablations, recommendations."""

from __future__ import annotations

import polars as pl

import store
from app.exhibits.exhibit import Frames
from app.findings.finding import Evidence, Finding, Tone
from app.frames import ablation as frames_of_ablation
from app.frames import compress_measured, evaluation, recommendations
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
        answer = f"On {study.machine[1]}: {study.verdict.sentence.rstrip('.')}"
        found.append(Finding("Caching", answer, evidence=tuple(proof), page="Cache"))
    if found or not run.has_trace:
        return found
    answer = "Whether caching pays in time depends on a machine, and no study stands beside this run"
    return [Finding("Caching", answer, "The command moescope cache makes one.", tone="unknown", page="Cache")]


def plans(run: store.Run, frames: Frames) -> list[Finding]:
    """What was planned for this model, and what following the plans cost."""
    if run.live:
        return []
    # Plans do not change the version of a run, by which frames are kept: they are read anew.
    rows = compress_measured.plans(run)
    found = [_plan(row) for row in rows.head(_MOST).iter_rows(named=True)]
    if len(rows) > _MOST:
        found.append(Finding("Plans", f"{len(rows) - _MOST} older plans stand beside the run too", page="Compress"))
    planned = set(rows["digest"].to_list())
    others = frames(evaluation.evaluations, run).filter(~pl.col("plan").fill_null("").is_in(list(planned)))
    found += [_evaluation(row) for row in others.head(_MOST).iter_rows(named=True)]
    for row in recommendations.recommendations(run).head(1).iter_rows(named=True):
        proof = (Evidence("memory that was asked for", row["memory"], source=row["file"]),
                 Evidence("candidates", float(row["candidates"]), form="count", source=row["file"]))  # fmt: skip
        answer = f"Newest recommendation: {row['verdict'].rstrip('.')}"
        found.append(Finding("Plans", answer, evidence=proof, page="Compress"))
    answer = "No plan and no evaluation stands beside this run: what cutting it would cost was not measured"
    return found or [Finding("Plans", answer, tone="unknown", page="Compress")]


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
        tone: Tone = "attention" if more else "plain"
        answer = f"Experts {names}: {sentence.split(': ', 1)[-1].rstrip('.')}"
        found.append(Finding("Experiments", answer, evidence=proof, tone=tone, page="Super experts"))
    return found


def _plan(row: dict[str, object]) -> Finding:
    answer = f"{row['plan']}: keeps {row['experts_after']:,} of {row['experts']:,} experts and saves {row['saved']}"
    if row["kl"] is None:
        proof = Evidence("predicted weighed error", row["weighed_error"], source=str(row["file"]))  # type: ignore[arg-type]
        return Finding("Plans", answer, "It was not measured yet.", (proof,), page="Compress")
    more = f"Measured on {row['tokens']:,} tokens, perplexity is {row['ratio']:.3f} × the original's."
    return Finding("Plans", answer, more, (
        Evidence("KL divergence, nats per token", row["kl"], control=0.0, control_is="the model as it was",  # type: ignore[arg-type]
                 source="evaluation", exhibit="compress-measured"),
        Evidence("perplexity ratio", row["ratio"], control=1.0, control_is="the model as it was",  # type: ignore[arg-type]
                 source="evaluation", exhibit="compress-measured"),
    ), page="Compress")  # fmt: skip


def _evaluation(row: dict[str, object]) -> Finding:
    answer = f"{row['model']} against {row['base']}: perplexity {row['ratio']:.3f} × on {row['tokens']:,} tokens"
    answer += "" if row["held_out"] else ", which were not held out"
    return Finding("Plans", answer, evidence=(
        Evidence("KL divergence, nats per token", row["kl"], row["kl_low"], row["kl_high"], 0.0,  # type: ignore[arg-type]
                 "the base itself", source="evaluation", exhibit="compress-measured"),
        Evidence("perplexity ratio", row["ratio"], row["ratio_low"], row["ratio_high"], 1.0,  # type: ignore[arg-type]
                 "the base itself", source="evaluation", exhibit="compress-measured"),
    ), page="Compress")  # fmt: skip
