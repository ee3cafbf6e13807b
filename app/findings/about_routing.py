"""Findings about the router: how even, how decided, how much it tells domains apart, how much it stays where it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

import store
from app.exhibits.exhibit import Frames
from app.findings.finding import Evidence, Finding, Form, Tone, beyond, listed
from app.frames import confidence as frames_of_confidence
from app.frames import consistency as frames_of_consistency
from app.frames import flow, imbalance, load, specialization
from app.frames.alerts import COLLAPSE, MAX_VIOLATION

EVEN = 0.8
"""Load is called even where the median layer uses at least this part of its experts effectively ..."""

TWICE = 1.0
"""... and no layer's busiest expert takes more than twice the mean."""


def balance(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether a layer collapsed, and how uneven the least even one is."""
    even = frames(load.balance, run).drop_nulls("max_violation")
    if even.is_empty():
        return [Finding("Balance", "No selection was recorded, so nothing can be said of the load", tone="unknown")]
    worst = even.sort("max_violation", descending=True).row(0, named=True)
    fewest = even.sort(pl.col("effective_experts") / pl.col("num_experts")).row(0, named=True)
    used = even.select((pl.col("effective_experts") / pl.col("num_experts")).median()).item()
    collapsed = even.filter(
        (pl.col("effective_experts") < COLLAPSE * pl.col("top_k")) & (pl.col("num_experts") > pl.col("top_k"))
    )["label"].to_list()
    tone: Tone = "plain"
    if worst["max_violation"] > MAX_VIOLATION:
        word, tone = "uneven", "attention"
    else:
        word = "even" if used >= EVEN and worst["max_violation"] < TWICE else "uneven in places"
    answer = f"The load is {word}: the median layer uses {used:.0%} of its experts effectively"
    if collapsed:
        answer, tone = f"Routing collapsed in layer {listed(collapsed)}", "problem"
    loads = frames(load.expert_load, run).filter(
        (pl.col("layer") == worst["layer"]) & (pl.col("step") == worst["step"])
    )
    busiest = int(loads.sort("tokens", descending=True)["expert"][0])
    more = "" if collapsed else "No layer collapsed. "
    more += f"In the least even layer, {worst['label']}, expert {busiest} takes {worst['max_violation'] + 1:.1f} × the"
    more += " mean load."
    return [Finding("Balance", answer, more, (
        Evidence(f"MaxVio, layer {worst['label']}", worst["max_violation"], control=0.0,
                 control_is="perfectly even load", source="max_violation", exhibit="load"),
        Evidence(f"variation of the load (CV), layer {worst['label']}", worst["cv"], control=worst["noise_cv"],
                 control_is="a balanced router on as few tokens", source="cv", exhibit="balance"),
        Evidence(f"effective experts, layer {fewest['label']}", fewest["effective_experts"],
                 control=float(fewest["num_experts"]), control_is="all of them, used evenly",
                 source="effective_experts", exhibit="balance"),
    ), tone, page="Routing", layer=worst["label"], expert=busiest)]  # fmt: skip


def unseen(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether layers are unbalanced in a way that the balance loss does not see; nothing where none is."""
    hidden = frames(imbalance.spreads, run).filter(pl.col("unseen_imbalance")).sort("load_cv", descending=True)
    if hidden.is_empty():
        return []
    worst, names = hidden.row(0, named=True), hidden["label"].to_list()
    answer = f"The balance loss is satisfied and the load is not balanced in layer{'s' if len(names) > 1 else ''} "
    more = "Probabilities are flat while tokens go to few experts: the loss has nothing to lower."
    return [Finding("Balance loss", answer + listed(names), more, (
        Evidence(f"variation of the load (CV), layer {worst['label']}", worst["load_cv"], control=worst["noise_cv"],
                 control_is="a balanced router on as few tokens", source="cv", exhibit="load-spread"),
        Evidence(f"variation of router probability (CV), layer {worst['label']}", worst["probability_cv"],
                 source="probability_cv", exhibit="load-spread"),
        Evidence("part of the imbalance that the loss sees", worst["seen"], form="share", source="seen_imbalance",
                 exhibit="load-probability"),
    ), "attention", page="Architecture", layer=worst["label"])]  # fmt: skip


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
    layer = None
    if not unused:
        answer = f"No expert is dead: all {int(even['num_experts'].sum()):,} were used at least once {tokens}"
    elif chance >= unused / 2:
        answer = f"{_experts(unused, 'was', 'were')} never used {tokens}, which is too few of them to blame the router:"
        answer += f" a balanced one leaves {chance:.2g} unused by chance"
    else:
        where = even.filter(pl.col("dead") > 0)["label"].to_list()
        layers = f"layer{'s' if len(where) > 1 else ''} {listed(where)}"
        answer = f"{_experts(unused, 'was', 'were')} never used {tokens} ({layers}), which chance does not explain"
        layer = where[0]
    below = f"less than {load.NEARLY_DEAD:.0%} of the balanced load."
    more = f"{_experts(nearly, 'gets', 'get', ' more' if unused else '')} {below}" if nearly else ""
    tone: Tone = "attention" if nearly or (unused and chance < unused / 2) else "plain"
    return [Finding("Dead experts", answer, more, (
        Evidence("experts never used", float(unused), control=chance, control_is="expected of a balanced router",
                 form="count" if chance < 0.5 else "number", source="dead_experts", exhibit="balance"),
        Evidence(f"used, but below {load.NEARLY_DEAD:.0%} of the balanced load", float(nearly), form="count",
                 source="table expert_load", exhibit="balance"),
    ), tone, page="Routing", layer=layer)]  # fmt: skip


def confidence(run: store.Run, frames: Frames) -> list[Finding]:
    """How decided the router is, beside a router that does not care."""
    found = frames(frames_of_confidence.confidence, run).filter(pl.col("num_experts") > 1)
    if found.is_empty():
        reason = run.omissions.get("logits", "its logits were not seen")
        return [Finding("Confidence", f"How decided the router is cannot be said: {reason.rstrip('.')}",
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
    answer = f"The router is {word}"
    more = f"Its entropy goes from {tightest['part']:.0%} of the largest possible in layer {tightest['label']} to"
    more += f" {loosest['part']:.0%} in layer {loosest['label']}."
    if len(entropy) == 1:
        more = f"Its entropy is {part:.0%} of the largest possible."
    proof = [
        Evidence("entropy, part of the largest", part, low=tightest["part"], high=loosest["part"],
                 control=1.0, control_is="an indifferent router", form="share", source="table router_load",
                 exhibit="confidence"),
        Evidence("probability of the first choice", share, control=uniform, control_is="1 / experts", form="share",
                 source="table router_load", exhibit="confidence"),
    ]  # fmt: skip
    held = found.filter(pl.col("quantity") == "selected_probability").drop_nulls("mean")
    if len(held):
        low, middle, high = held.select(pl.col("mean").min().alias("low"), pl.col("mean").median().alias("middle"),
                                        pl.col("mean").max().alias("high")).row(0)  # fmt: skip
        more += f" The selected experts hold {middle:.0%} of the probability; the rest is what top-k leaves out."
        proof.append(Evidence("probability of the selected experts, median and range of layers", middle, low, high,
                              form="share", source="table router_load", exhibit="confidence"))  # fmt: skip
    return [Finding("Confidence", answer, more, tuple(proof), page="Routing", layer=loosest["label"])]


def domains(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether experts are for domains, beside the same text with its labels shuffled."""
    if len(run.domains) < 2:
        return [Finding("Domains", "The text has one domain, so nothing can be said of experts for domains",
                        tone="unknown")]  # fmt: skip
    row = _of_model(run, frames, "domain")
    if row is None:
        return [Finding("Domains", _not_computed(run, "How far experts are for domains"), tone="unknown")]
    times = row["value"] / row["shuffled"] if row["shuffled"] else math.inf
    if not beyond(row["value"], row["low"], row["shuffled"]):
        answer = "No specialisation in domains: load varies no more between domains than by chance"
    else:
        much = "" if times >= 2 else " a little"
        answer = f"Experts specialise in domains{much}, {times:.1f} × chance"
    return [Finding("Domains", answer, evidence=(
        _specialization(row, "variation over domains", "labels shuffled", "number"),
    ), page="Routing")]  # fmt: skip


def tokens(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether the token itself says which expert comes first, beside shuffled text."""
    row = _of_model(run, frames, "input")
    if row is None:
        return []
    if beyond(row["value"], row["low"], row["shuffled"]):
        answer = "Experts choose by the token itself"
    else:
        answer = "No choice by the token itself beyond chance"
    return [Finding("Tokens", answer, evidence=(
        _specialization(row, "first choices that are own tokens", "text shuffled", "share"),
    ), page="Expert")]  # fmt: skip


def consistency(run: store.Run, frames: Frames) -> list[Finding]:
    """Whether neighbouring tokens share experts beyond what popularity and a random router give."""
    model = frames(frames_of_consistency.srp_model, run).filter(
        pl.col("domain").is_null() & (pl.col("segment_length") == 16)
    )
    value: dict[str, dict[str, Any]] = {row["control"]: row for row in model.iter_rows(named=True)}
    if "observed" not in value:
        answer = _not_computed(run, "Whether neighbouring tokens share experts")
        return [Finding("Local consistency", answer, tone="unknown")]
    seen, chance = value["observed"], value.get("shuffled", {}).get("value")
    if chance is None:
        answer = f"Neighbouring tokens have an SRP of {seen['value']:.1%}; no control was computed beside it"
    elif beyond(seen["value"], seen["low"], chance):
        answer = "Neighbouring tokens share experts"
    else:
        answer = "No local consistency: neighbours share no more experts than popularity explains"
    return [Finding("Local consistency", answer, evidence=(
        _control(seen, "SRP, 16 tokens", chance, "tokens shuffled", "srp"),
        _control(seen, "the same", value.get("uniform", {}).get("value"), "a random router", "srp"),
    ), page="Local consistency")]  # fmt: skip


def cache(run: store.Run, frames: Frames) -> list[Finding]:
    """How many requests a small cache of experts would answer, beside shuffled text and the best that any rule can."""
    rows = frames(frames_of_consistency.key_numbers, run).filter(pl.col("name") != "SRP")
    hits = {row["name"]: row for row in rows.iter_rows(named=True)}
    if "LRU hit rate" not in hits:
        return []
    lru = hits["LRU hit rate"]
    size = "twice" if lru["ratio"] == 2 else f"{lru['ratio']:.3g} times"
    answer = f"A cache of {size} a token's experts answers {lru['value']:.0%} of requests"
    if lru["control"] is not None and not beyond(lru["value"], lru["low"], lru["control"]):
        answer = "No gain from the order of tokens for a cache"
    more = f"Rates are those of {lru['detail']}."
    more += f" No rule reaches more than {hits['Belady hit rate']['value']:.0%}." if "Belady hit rate" in hits else ""
    return [Finding("Cache", answer, more, tuple(
        _control(row, name, row["control"], "tokens shuffled", name.split()[0].lower())
        for name, row in hits.items()
    ), page="Cache")]  # fmt: skip


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
    if beyond(best["value"], best["low"], base):
        answer = f"One layer's choices foretell {best['value']:.0%} of the next layer's"
    else:
        answer = "No foresight: one layer's choices do not foretell the next layer's"
    more = "As many experts are guessed as a token uses; recall is the part of the next layer's choices among them."
    return [Finding("Foresight", answer, more, (
        Evidence("recall", best["value"], best["low"], best["high"], base,
                 "most popular experts", "share", "transition_recall", "transition-information"),
        Evidence("the same", best["value"], best["low"], best["high"], best["chance"], "random experts", "share",
                 "transition_recall", "transition-information"),
    ), page="Routing")]  # fmt: skip


def _experts(number: int, one: str, several: str, more: str = "") -> str:
    """So many experts with their verb."""
    return f"{number:,}{more} expert{'s' if number != 1 else ''} {one if number == 1 else several}"


def _of_model(run: store.Run, frames: Frames, kind: str) -> dict[str, Any] | None:
    """What experts are for over the whole model, per expert and with its control; None where it was not computed."""
    found = frames(specialization.specialization, run).filter(
        pl.col("layer").is_null() & (pl.col("form") == "expert") & (pl.col("kind") == kind)
    )
    found = found.drop_nulls("shuffled")
    return None if found.is_empty() else found.row(0, named=True)


def _control(row: dict[str, Any], name: str, control: float | None, what: str, metric: str) -> Evidence:
    source = metric if metric == "srp" else f"hit_rate_{metric}"
    exhibit = "srp" if metric == "srp" else "hit-rates"
    return Evidence(name, row["value"], row["low"], row["high"], control, what, "share", source, exhibit)


def _specialization(row: dict[str, Any], name: str, shuffled: str, form: Form) -> Evidence:
    return Evidence(name, row["value"], row["low"], row["high"], row["shuffled"], shuffled, form, row["metric"],
                    "specialization")  # fmt: skip


def _not_computed(run: store.Run, what: str) -> str:
    if run.live:
        return f"{what} is computed from the whole trace when the collection ends"
    if not run.has_trace:
        return f"{what} cannot be said: the run holds counts, and no trace of single tokens"
    return f"{what} has not been computed: run moescope runs compute on it"
