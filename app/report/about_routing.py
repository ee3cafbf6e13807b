"""Findings about the router: how even, how decided, how much it tells domains apart, how much it stays where it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

import store
from app.exhibits.exhibit import Frames
from app.frames import confidence as frames_of_confidence
from app.frames import consistency as frames_of_consistency
from app.frames import flow, load, specialization
from app.frames.alerts import COLLAPSE, MAX_VIOLATION
from app.report.finding import Evidence, Finding, listed

EVEN = 1.0
"""Load is called fairly even while no layer's busiest expert takes more than twice the mean."""


def balance(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether a layer collapsed, and how uneven the least even one is."""
    even = frames(load.balance, run).drop_nulls("max_violation")
    if even.is_empty():
        return [Finding("Balance", "No selection was recorded, so nothing can be said of the load.", tone="unknown")]
    worst = even.sort("max_violation", descending=True).row(0, named=True)
    fewest = even.sort(pl.col("effective_experts") / pl.col("num_experts")).row(0, named=True)
    collapsed = even.filter(
        (pl.col("effective_experts") < COLLAPSE * pl.col("top_k")) & (pl.col("num_experts") > pl.col("top_k"))
    )["label"].to_list()
    busiest = f"in the least even layer, {worst['label']}, the busiest expert takes {worst['max_violation'] + 1:.1f} ×"
    busiest += " the mean load"
    if collapsed:
        sentence, tone = f"Routing collapsed in layer {listed(collapsed)}; {busiest}.", "problem"
    elif worst["max_violation"] > MAX_VIOLATION:
        sentence, tone = f"No layer collapsed, but the load is uneven: {busiest}.", "attention"
    else:
        even_or_not = "fairly even" if worst["max_violation"] < EVEN else "uneven in places"
        sentence, tone = f"No layer collapsed, and the load is {even_or_not}: {busiest}.", "plain"
    return [Finding("Balance", sentence, (
        Evidence(f"MaxVio, layer {worst['label']}", worst["max_violation"], control=0.0,
                 control_is="perfectly even load", source="max_violation", exhibit="load"),
        Evidence(f"variation of the load (CV), layer {worst['label']}", worst["cv"], control=worst["noise_cv"],
                 control_is="a balanced router on as few tokens", source="cv", exhibit="balance"),
        Evidence(f"effective experts, layer {fewest['label']}", fewest["effective_experts"],
                 control=float(fewest["num_experts"]), control_is="all of them, used evenly",
                 source="effective_experts", exhibit="balance"),
    ), tone)]  # type: ignore[arg-type]  # fmt: skip


def dead(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether experts were never used, and whether chance explains it."""
    even = frames(load.balance, run).drop_nulls("max_violation")
    if even.is_empty():
        return []
    unused, nearly, chance = (
        int(even["dead"].sum()),
        int(even["nearly_dead"].sum()),
        float(even["expected_dead"].sum()),
    )
    tokens = f"on {run.info.tokens:,} tokens"
    if not unused:
        sentence = (
            f"No expert is dead: every one of {int(even['num_experts'].sum()):,} was used at least once {tokens}."
        )
    elif chance >= unused / 2:
        sentence = f"{unused:,} experts were never used {tokens}: so few that chance explains {chance:.2g} of them."
    else:
        where = listed(even.filter(pl.col("dead") > 0)["label"].to_list())
        sentence = f"{unused:,} experts were never used {tokens} (layers {where}), which chance does not explain."
    if nearly:
        sentence += f" {nearly:,} more get less than {load.NEARLY_DEAD:.0%} of the balanced load."
    tone = "attention" if nearly or (unused and chance < unused / 2) else "plain"
    return [Finding("Dead experts", sentence, (
        Evidence("experts never used", float(unused), control=chance, control_is="expected of a balanced router",
                 form="count" if chance < 0.5 else "number", source="dead_experts", exhibit="balance"),
        Evidence(f"experts below {load.NEARLY_DEAD:.0%} of the balanced load", float(nearly), form="count",
                 source="table expert_load", exhibit="balance"),
    ), tone)]  # type: ignore[arg-type]  # fmt: skip


def confidence(run: store.Run, frames: Frames) -> list[Finding]:
    """How decided the router is, beside a router that does not care."""
    found = frames(frames_of_confidence.confidence, run)
    if found.is_empty():
        reason = run.omissions.get("logits", "its logits were not seen")
        return [Finding("Confidence", f"How decided the router is cannot be said: {reason.rstrip('.')}.",
                        tone="unknown")]  # fmt: skip
    entropy = found.filter(pl.col("quantity") == "entropy").with_columns(
        (pl.col("mean") / pl.col("num_experts").log()).alias("part")
    )
    part = float(np.average(entropy["part"], weights=entropy["tokens"]))
    loosest = entropy.sort("part", descending=True).row(0, named=True)
    tightest = entropy.sort("part").row(0, named=True)
    top = found.filter(pl.col("quantity") == "top_probability")
    share = float(np.average(top["mean"], weights=top["tokens"]))
    uniform = float(np.mean(1 / top["num_experts"].to_numpy()))
    word = "decided" if part < 0.5 else "moderately decided" if part < 0.8 else "hardly decided"
    sentence = (
        f"The router is {word}: its probabilities have {part:.0%} of the largest possible entropy on average, from "
        f"{tightest['part']:.0%} in layer {tightest['label']} to {loosest['part']:.0%} in layer {loosest['label']}."
    )
    return [Finding("Confidence", sentence, (
        Evidence("entropy of the router, part of the largest possible", part, low=tightest["part"],
                 high=loosest["part"], control=1.0, control_is="a router that does not care; range over layers",
                 form="share", source="table router_load", exhibit="confidence"),
        Evidence("probability of the first choice", share, control=uniform, control_is="1 / experts", form="share",
                 source="table router_load", exhibit="confidence"),
    ))]  # fmt: skip


def domains(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether experts are for domains or for tokens, beside the same text with its labels shuffled."""
    found = frames(specialization.specialization, run)
    whole = found.filter(pl.col("layer").is_null() & (pl.col("form") == "expert"))
    by_kind = {row["kind"]: row for row in whole.iter_rows(named=True)}
    if len(run.domains) < 2:
        return [Finding("Domains", "The text has one domain, so nothing can be said of experts for domains.",
                        tone="unknown")]  # fmt: skip
    if "domain" not in by_kind:
        return [Finding("Domains", _not_computed(run, "How far experts are for domains"), tone="unknown")]
    row = by_kind["domain"]
    beyond = row["shuffled"] is not None and row["low"] is not None and row["low"] > row["shuffled"]
    times = row["value"] / row["shuffled"] if row["shuffled"] else math.nan
    if beyond and times >= 2:
        sentence = (
            f"Experts specialise in domains: their load varies {times:.1f} × as much between domains as by chance."
        )
    elif beyond:
        sentence = f"Experts specialise in domains a little: their load varies {times:.1f} × as much as by chance."
    else:
        sentence = "Experts do not specialise in domains: their load varies no more between domains than by chance."
    proof = [_specialization(row, "variation of an expert's load over domains")]
    if "input" in by_kind:
        proof.append(_specialization(by_kind["input"], "first choices that the token's id alone tells"))
        token = by_kind["input"]
        if token["shuffled"] is not None and token["low"] is not None:
            more = "tells far" if token["value"] > 2 * token["shuffled"] else "tells"
            sentence += f" The token itself {more} more than chance of which expert comes first."
    return [Finding("Domains", sentence, tuple(proof))]


def consistency(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether neighbouring tokens share experts beyond what popularity and a random router give."""
    model = frames(frames_of_consistency.srp_model, run).filter(
        pl.col("domain").is_null() & (pl.col("segment_length") == 16)
    )
    value: dict[str, dict[str, Any]] = {row["control"]: row for row in model.iter_rows(named=True)}
    if "observed" not in value:
        sentence = _not_computed(run, "Whether neighbouring tokens share experts")
        return [Finding("Local consistency", sentence, tone="unknown")]
    seen = value["observed"]
    chance = value.get("shuffled", {}).get("value")
    beyond = chance is not None and seen["low"] is not None and seen["low"] > chance
    proof = [_control(seen, "SRP, segments of 16 tokens", chance, "tokens shuffled: popularity alone", "srp"),
             _control(seen, "the same", value.get("uniform", {}).get("value"), "a random router", "srp")]  # fmt: skip
    rates = frames(frames_of_consistency.key_numbers, run)
    hits = {row["name"]: row for row in rates.iter_rows(named=True)}
    lru = hits.get("LRU hit rate")
    if beyond:
        sentence = f"Routing is locally consistent: 16 neighbouring tokens share experts (SRP {seen['value']:.1%}) more"
        sentence += f" than popularity explains ({chance:.1%})."
    elif chance is None:
        sentence = f"SRP over 16 tokens is {seen['value']:.1%}; no control was computed beside it."
    else:
        sentence = "Routing is not locally consistent: neighbouring tokens share no more experts than popularity"
        sentence += f" explains (SRP {seen['value']:.1%}, {chance:.1%} with shuffled tokens)."
    if lru is not None:
        proof += [_control(row, f"{name}, {row['detail']}", row["control"], "tokens shuffled", name.split()[0].lower())
                  for name, row in hits.items() if name != "SRP"]  # fmt: skip
        sentence += f" A cache of twice the experts of one token hits {lru['value']:.1%} with LRU"
        sentence += f"; popularity alone gives {lru['control']:.1%}." if lru["control"] is not None else "."
    return [Finding("Local consistency", sentence, tuple(proof))]


def foresight(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether the experts of the next layer follow from this layer's, beyond popularity."""
    found = frames(flow.predictability, run).filter(
        pl.col("layer").is_null() & (pl.col("extra") == 0) & (pl.col("control") == "observed")
    )
    rows = {row["predictor"]: row for row in found.sort("distance", descending=True).iter_rows(named=True)}
    if "transition" not in rows:
        return []
    best, popular = rows["transition"], rows.get("popularity")
    base = popular["value"] if popular else best["chance"]
    better = best["low"] is not None and best["low"] > base
    sentence = (
        f"The choices of one layer {'foretell' if better else 'do not foretell'} the next layer's: as many experts as a"
        f" token uses, guessed from them, hold {best['value']:.1%} of what is chosen; the most popular ones {base:.1%}."
    )
    return [Finding("Foresight", sentence, (
        Evidence("recall of the next layer's experts", best["value"], best["low"], best["high"], base,
                 "most popular experts", "share", "transition_recall", "transition-information"),
        Evidence("the same", best["value"], best["low"], best["high"], best["chance"], "random experts", "share",
                 "transition_recall", "transition-information"),
    ))]  # fmt: skip


def _control(row: dict[str, Any], name: str, control: float | None, what: str, metric: str) -> Evidence:
    source = metric if metric == "srp" else f"hit_rate_{metric}"
    exhibit = "srp" if metric == "srp" else "hit-rates"
    return Evidence(name, row["value"], row["low"], row["high"], control, what, "share", source, exhibit)


def _specialization(row: dict[str, Any], name: str) -> Evidence:
    return Evidence(name, row["value"], row["low"], row["high"], row["shuffled"], "labels shuffled", "number",
                    row["metric"], "specialization")  # fmt: skip


def _not_computed(run: store.Run, what: str) -> str:
    if run.live:
        return f"{what} is computed from the whole trace when the collection ends."
    if not run.has_trace:
        return f"{what} cannot be said: the run holds counts, and no trace of single tokens."
    return f"{what} has not been computed: run moescope runs compute on it."
