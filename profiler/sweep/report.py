"""What a sweep says: the document that is kept, the verdict in one sentence, and what weakens it; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from profiler.sweep.trials import Trial
from store.evaluations import VERSION, Document

CHEAP = 0.01
"""Nats per token: about 1 % of perplexity."""

_UNTRAINED = (
    "The router was trained for its own rule: this is what a rule costs when it is put upon the model, not what a model"
    " trained with it would do."
)
_TIME = (
    "Experts that a rule drops run here with weight 0, so that tokens/s are those of the measurement: what a rule saves"
    " stands in the share of the experts' FLOPs."
)


def document(
    found: Mapping[str, Any], *, model: Mapping[str, Any], data: Mapping[str, Any], notes: Sequence[str] = ()
) -> Document:
    """The sweep as a JSON document of kind ``sweep``; what was not measured is null.

    Args:
        found: what :func:`profiler.sweep.sweep` gives.
        model: what names the model, such as its name and fingerprint.
        data: what describes the text, and which part of it calibrates.
        notes: what else is to be known.
    """
    return {
        "kind": "sweep",
        "version": VERSION,
        "model": dict(model),
        "data": dict(data),
        **{name: found[name] for name in ("base", "rules", "slimmability", "contrast", "rerouting", "search")},
        "notes": [*notes, *_notes(found)],
        "verdict": verdict(found),
    }


def name_of(row: Mapping[str, Any]) -> str:
    """A row's rule and value as they are typed."""
    return Trial(row["rule"], row["value"], row["weights"]).name


def verdict(found: Mapping[str, Any]) -> str:
    """One sentence or two: what can be saved for about 1 % of perplexity, and whether any rule predicts better.

    A rule costs at most that much when its whole interval says so; it predicts better when its whole interval lies
    below no change.
    """
    rows = found["rules"]
    if not rows:
        return "No rule was tried."
    return f"{_saving(rows)} {_gain(rows)}"


def _saving(rows: Sequence[Mapping[str, Any]]) -> str:
    saving = [row for row in rows if row["rule"] not in ("mask_top", "shared") and _share(row) < 0.995]
    if not saving:
        return "No rule that was tried saves experts."
    sure = [row for row in saving if row["change"]["high"] is not None and row["change"]["high"] <= CHEAP]
    if not sure:
        mild = min(saving, key=lambda row: float(row["change"]["value"]))
        return (
            "No: every rule that saves experts costs more than 1 % of perplexity, or may; the mildest,"
            f" {name_of(mild)}, leaves {_share(mild):.0%} of the experts' FLOPs and costs {_cost(mild)}."
        )
    best = min(sure, key=_share)
    return (
        f"Yes: {name_of(best)} leaves {_share(best):.0%} of the experts' FLOPs and costs {_cost(best)}, the most that"
        f" {len(saving)} rules save for 1 % of perplexity."
    )


def _gain(rows: Sequence[Mapping[str, Any]]) -> str:
    better = [row for row in rows if row["change"]["high"] is not None and row["change"]["high"] < 0]
    if not better:
        return "No rule predicts the text better than the router's own choice."
    best = min(better, key=lambda row: float(row["change"]["value"]))
    return (
        f"{name_of(best)} predicts it better than the router's own choice ({_cost(best)}; the best of {len(rows)} that"
        " were tried, which flatters it)."
    )


def _share(row: Mapping[str, Any]) -> float:
    return float(row["routing"]["all"]["flops_share"])


def _cost(row: Mapping[str, Any]) -> str:
    change = row["change"]
    ends = "" if change["low"] is None else f", 95 % interval {change['low']:+.3g} to {change['high']:+.3g}"
    return f"{change['value']:+.3g} nats per token{ends}"


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [_UNTRAINED, _TIME] if found["rules"] else []
    if found["base"] and not found["base"]["kl"] and found["rules"]:
        notes.append("There is no KL divergence: the model's probabilities of so much text would take over 2 GiB.")
    if any(row["value"] == "odp" for row in found["rules"]):
        notes.append("ODP's medians come from the sequences set apart, its loss from the others; its protected tokens "
                     "and its choice of layers are not here.")  # fmt: skip
    if found["contrast"]:
        notes.append("Contrast is judged on the text as it stands, not on words that the model writes itself.")
    if found["rerouting"]:
        notes.append("Layers, steps and learning rate of the rerouting are ours: the publication's were not verified.")
    if found["search"]:
        notes.append("Both sides of the search have a judge who knows the answer; without one neither reaches this.")
    return notes
