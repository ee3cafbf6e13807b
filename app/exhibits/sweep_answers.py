"""What a sweep says in one sentence each, in Markdown; empty where it was not measured. "No" is an answer: wherever the
interval does not exclude it."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.exhibits.exhibit import Absent
from app.exhibits.sweep import chosen, trial_of
from app.frames import sweep as frames_of
from app.frames import sweep_studies as frames_of_studies
from app.frames.sweep import of_a_document
from app.markdown import plain


@of_a_document
def costs(run: store.Run, *, sweep: str | None = None) -> str:
    """What can be saved for about 1 % of perplexity, and whether a rule predicts better."""
    return plain(str(chosen(run, sweep)["verdict"]), 600)


@of_a_document
def difficulty(run: store.Run, *, sweep: str | None = None, trial: str | None = None) -> str:
    """Whether harder tokens use more experts, over all text and within domains."""
    document = chosen(run, sweep)
    try:
        name = trial_of(document, trial, varied=True)
    except Absent:
        return ""
    frame = frames_of.difficulty(document).filter(pl.col("trial") == name)
    whole = frame.filter(pl.col("of") == "all").row(0, named=True)
    if whole["correlation"] is None:
        return f"Under {plain(name)} all tokens use as many experts."
    words = (
        f"{_yes(_sign(whole, 'correlation'))}: under {plain(name)} the correlation of a token's loss and its experts"
    )
    words += f" is **{round(whole['correlation'], 2) + 0.0:+.2f}**{_ends(whole, 'correlation', '+.2f')}"
    inside = frame.filter((pl.col("of") == "domain") & pl.col("correlation").is_not_null())
    up = sum(_sign(row, "correlation") > 0 for row in inside.iter_rows(named=True))
    down = sum(_sign(row, "correlation") < 0 for row in inside.iter_rows(named=True))
    if len(inside) > 1:
        words += (
            f"; within a domain it is above 0 in {up} of {len(inside)} and below 0 in {down}, by the whole interval"
        )
    ranked = inside.sort("active")
    if len(ranked) > 1:
        least, most = (ranked.row(place, named=True) for place in (0, -1))
        words += (
            f". {_named(most)} uses most experts per token ({most['active']:.2f}, mean loss {most['loss']:.2f} nats)"
        )
        words += f", {_named(least)} fewest ({least['active']:.2f}, {least['loss']:.2f} nats)"
    return f"{words}."


@of_a_document
def slimmability(run: store.Run, *, sweep: str | None = None) -> str:
    """Whether the loss falls with every expert up to the model's own number, and where it is least."""
    found = chosen(run, sweep)["slimmability"]
    if found is None:
        return ""
    own = f"{found['own']:g}"
    first = {
        True: f"Yes: the loss falls with every step up to the model's own {own} experts per token",
        False: f"No: the loss does not fall with every step up to the model's own {own} experts per token",
        None: f"No number below the model's own {own} was tried",
    }[found["monotone"]]
    above = [step for step in found["steps"] if step["from"] >= found["own"]]
    better = [step for step in above if _sign(step["change"], "value") < 0]
    worse = [step for step in above if _sign(step["change"], "value") > 0]
    if not above:
        return f"{first}."
    step = (better or worse or above)[0]
    words = f"from {step['from']} to {step['to']} it changes by {step['change']['value']:+.3g} nats per token"
    words += _ends({f"value{end}": step["change"][end.strip("_") or "value"] for end in ("", "_low", "_high")}, "value")
    gains = "more experts than it was trained with help" if better else "more experts than that make it worse"
    gains = gains if better or worse else "more experts than that do not clearly help"
    return f"{first}; {gains}: {words}."


@of_a_document
def redundancy(run: store.Run, *, sweep: str | None = None) -> str:
    """What the best experts, and the shared ones, are worth."""
    frame = frames_of.rules(chosen(run, sweep)).filter(pl.col("domain") == "all")
    masked = frame.filter((pl.col("rule") == "mask_top") & (pl.col("number") > 0)).sort("number")
    words = []
    if len(masked):
        row = masked.row(0, named=True)
        words.append(
            f"Without the best **{row['number']:.2%}** of its experts each token costs {row['change']:+.3g} nats more"
            f"{_ends(row, 'change')}, though as many others run in their place"
        )
    for row in frame.filter(pl.col("rule") == "shared").iter_rows(named=True):
        how = "replaced by one more routed expert" if row["value"] == "replaced" else "switched off"
        words.append(f"with the shared experts {how} it is {row['change']:+.3g} nats{_ends(row, 'change')}")
    return f"{'; '.join(words)}." if words else ""


@of_a_document
def contrast(run: store.Run, *, sweep: str | None = None) -> str:
    """Whether contrast finds the next token more often."""
    document = chosen(run, sweep)
    if not document["contrast"]:
        return ""
    frame = frames_of_studies.contrast(document).filter(pl.col("domain") == "all")
    best = frame.sort("difference").row(-1, named=True)
    words = (
        f"{_yes(_sign(best, 'difference'))}: of {len(frame)} strengths and ranks the best (rank {best['rank']}, beta "
    )
    words += f"{best['beta']:g}) finds the next token for **{best['accuracy']:.1%}**, the model alone for "
    words += f"{best['base_accuracy']:.1%} ({100 * best['difference']:+.2f} points"
    ends = [best["difference_low"], best["difference_high"]]
    words += "" if None in ends else f", 95 % interval {100 * ends[0]:+.2f} to {100 * ends[1]:+.2f}"
    return f"{words}); the weak routing lies KL {best['kl']:.3g} nats per token away."


@of_a_document
def rerouting(run: store.Run, *, sweep: str | None = None) -> str:
    """Whether vectors fitted on the text so far help with what follows, more than both controls."""
    document = chosen(run, sweep)
    if document["rerouting"] is None:
        return ""
    frame = frames_of_studies.rerouting(document).filter(pl.col("domain") == "all")
    row = {str(one["vectors"]): one for one in frame.iter_rows(named=True)}
    helps = _sign(row["fitted"], "change") < 0
    beaten = [name for name in ("random", "other") if _sign(row[name], "ahead") < 0]
    answer = "Yes" if helps and len(beaten) == 2 else "No"
    words = f"{answer}: vectors fitted on the text so far change the loss of what follows by "
    words += (
        f"**{row['fitted']['change']:+.3g}** nats per token{_ends(row['fitted'], 'change')}; random ones as long by "
    )
    words += f"{row['random']['change']:+.3g}, those fitted on another sequence by {row['other']['change']:+.3g}"
    if helps and len(beaten) < 2:
        words += "; they are not clearly ahead of both controls"
    fit: Any = document["rerouting"]["fit"]
    return f"{words}. On the text that they were fitted on the loss went from {fit['before']['value']:.3g} to " + (
        f"{fit['after']['value']:.3g}."
    )


@of_a_document
def search(run: store.Run, *, sweep: str | None = None) -> str:
    """Whether several k solve more than samples at equal FLOPs."""
    document = chosen(run, sweep)
    found = document["search"]
    if found is None:
        return ""
    gain = {f"value{end}": found["difference"][end.strip("_") or "value"] for end in ("", "_low", "_high")}
    ks = ", ".join(str(one["k"]) for one in found["counts"])
    words = (
        f"{_yes(_sign(gain, 'value'))}: greedy answers at k = {ks} together solve **{found['union']['value']:.1%}** of"
    )
    words += f" {found['items']:,} items, {found['samples']} samples at the model's own k, which cost as many FLOPs,"
    words += f" {found['sampled']['value']:.1%} (difference {100 * gain['value']:+.1f} points"
    low, high = gain["value_low"], gain["value_high"]
    return words + ("" if low is None else f", 95 % interval {100 * low:+.1f} to {100 * high:+.1f}") + ")."


def _sign(row: Any, name: str) -> int:
    """1 or -1 where the whole interval lies above or below 0; 0 where it does not, or there is none."""
    low, high = (row.get(f"{name}_{end}", row.get(end)) for end in ("low", "high"))
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def _yes(sign: int) -> str:
    return "Yes" if sign > 0 else "No"


def _ends(row: Any, name: str, form: str = "+.3g") -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f" (95 % interval {low:{form}} to {high:{form}})"


def _named(row: Any) -> str:
    return plain(str(row["label"]))
