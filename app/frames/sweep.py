"""What rules of routing did to the model itself, from the documents that ``moescope sweep`` leaves beside a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import polars as pl

import store
from moescope.errors import StoreError
from profiler.sweep.trials import Trial

Document = Mapping[str, Any]
Result = TypeVar("Result")
Given = ParamSpec("Given")

DAMAGED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, pl.exceptions.PolarsError)
"""What comes of a document that holds other things than it should."""

_ENDS = ("", "_low", "_high")


def floats(*names: str) -> dict[str, Any]:
    """Columns of estimates: value, low and high of each."""
    return {f"{name}{end}": pl.Float64 for name in names for end in _ENDS}


RULES: dict[str, Any] = {
    "trial": pl.String, "rule": pl.String, "value": pl.String, "number": pl.Float64, "weights": pl.String,
    "domain": pl.String, "tokens": pl.Int64, "flops_share": pl.Float64, "active": pl.Float64, "kept": pl.Float64,
    "changed": pl.Float64, **floats("loss", "change", "ratio", "kl", "agreement", "accuracy"),
    "tokens_per_second": pl.Float64,
}  # fmt: skip
_ACTIVE: dict[str, Any] = {
    "trial": pl.String, "domain": pl.String, "label": pl.String, "layer": pl.Int64, "step": pl.Int64,
    "mean": pl.Float64, "p95": pl.Float64, "kept": pl.Float64, "changed": pl.Float64,
}  # fmt: skip
_BINS: dict[str, Any] = {
    "trial": pl.String, "bin": pl.Int64, "tokens": pl.Int64, "loss": pl.Float64, "from": pl.Float64, "to": pl.Float64,
    "label": pl.String, "layer": pl.Int64, **floats("active"),
}  # fmt: skip
_HARD: dict[str, Any] = {
    "trial": pl.String, "of": pl.String, "label": pl.String, "tokens": pl.Int64, "loss": pl.Float64,
    **floats("active", "correlation"),
}  # fmt: skip


def of_a_document(read: Callable[Given, Result]) -> Callable[Given, Result]:
    """A document that someone has edited lacks what it should have: that is an error of the store, not of ours."""

    @wraps(read)
    def checked(*given: Given.args, **named: Given.kwargs) -> Result:
        try:
            return read(*given, **named)
        except DAMAGED as error:
            raise StoreError(
                f"a sweep beside the run is damaged ({error!r:.200}): run moescope sweep --again"
            ) from error

    return checked


def documents(run: store.Run) -> list[dict[str, Any]]:
    """The sweeps beside a run, the newest first.

    Raises:
        StoreError: one cannot be read.
    """
    return [store.read_evaluation(path) for path in store.list_evaluations(run.path, "sweep")]


def sweeps(run: store.Run) -> pl.DataFrame:
    """:func:`rules` over all text, of all sweeps beside a run."""
    parts = [rules(document).filter(pl.col("domain") == "all") for document in documents(run)]
    return pl.concat(parts) if parts else pl.DataFrame(schema=RULES)


@of_a_document
def title(document: Document) -> str:
    """On how much text, and how many rules, or which plan."""
    tried, tokens = document["rules"], f"{document['base']['tokens']:,} tokens"
    if is_of_a_plan(document):
        return f"plan {str(tried[0]['value'])[:12]} on {tokens}"
    return f"{len(tried)} rule{'s' if len(tried) != 1 else ''} on {tokens}"


@of_a_document
def is_of_a_plan(document: Document) -> bool:
    """Whether it tried one plan, and no rule."""
    return [one["rule"] for one in document["rules"]] == ["plan"]


@of_a_document
def rules(document: Document) -> pl.DataFrame:
    """One row per rule, value and domain (``all`` first), the unchanged model on top as rule ``none``.

    Columns: trial (as typed), rule, value, number (null for words), weights; domain, tokens; flops_share: of the routed
    experts' FLOPs under the router's own choice; active: experts per token, mean over layers; kept: of the router's own
    gate weight, mean over layers; changed: share of tokens with other experts, mean over layers; loss, change (nats per
    token, paired), ratio (of perplexities), kl, agreement of the likeliest token, accuracy, all with intervals;
    tokens_per_second of the measurement.
    """
    base = document["base"]
    rows: list[dict[str, Any]] = []
    for domain, part, routing in _parts(base):
        if part["loss"] is not None:
            own: dict[str, Any] = {"trial": "none", "rule": "none", "domain": domain, "tokens": part["tokens"]}
            own |= {**_routing(routing), **ends("loss", part["loss"]), **ends("accuracy", part["accuracy"])}
            rows.append(own | {"tokens_per_second": base["tokens_per_second"]})
    for one in document["rules"]:
        trial = Trial(one["rule"], one["value"], one["weights"])
        number = float(trial.value) if isinstance(trial.value, int | float) else None
        shown: dict[str, Any] = {
            "trial": trial.name,
            "rule": trial.rule,
            "value": trial.value if number is None else f"{number:g}",
        }
        shown |= {"number": number, "weights": trial.weights, "tokens_per_second": one["tokens_per_second"]}
        for domain, part, routing in _parts(one):
            row = {**shown, "domain": domain, "tokens": part["tokens"], **_routing(routing)}
            for name in ("loss", "change", "kl", "agreement", "accuracy"):
                row |= ends(name, part[name])
            rows.append(row | {f"ratio{end}": _exp(row[f"change{end}"]) for end in _ENDS})
    return pl.DataFrame(rows, schema=RULES)


@of_a_document
def active(document: Document) -> pl.DataFrame:
    """One row per rule, domain (``all`` too) and layer: mean and p95 of experts per token, kept gate weight, changed
    tokens; rule ``none`` is the model as it is."""
    rows = []
    for name, routing in (("none", document["base"]["routing"]), *_routings(document)):
        for domain, part in (("all", routing["all"]), *routing["per_domain"].items()):
            for place, layer in enumerate(routing["layers"]):
                measures = {measure: part[measure][place] for measure in ("mean", "p95", "kept", "changed")}
                rows.append({"trial": name, "domain": domain, **layer, "label": _label(layer), **measures})
    return pl.DataFrame(rows, schema=_ACTIVE)


@of_a_document
def bins(document: Document) -> pl.DataFrame:
    """One row per rule, bin of token loss and layer (label ``all`` = mean over layers): experts per token.

    Bins hold equally many tokens by their loss under the model as it is: loss is the mean, from and to its ends (nats).
    """
    rows = []
    for one in document["rules"]:
        for number, part in enumerate((one["difficulty"] or {"bins": []})["bins"]):
            shared = {
                "trial": _name(one),
                "bin": number,
                **{key: part[key] for key in ("tokens", "loss", "from", "to")},
            }
            rows.append({**shared, "label": "all", **ends("active", part["active"])})
            for layer, mean in zip(one["routing"]["layers"], part["layers"], strict=True):
                rows.append({**shared, "label": _label(layer), "layer": layer["layer"], "active": mean})
    return pl.DataFrame(rows, schema=_BINS)


@of_a_document
def difficulty(document: Document) -> pl.DataFrame:
    """One row per rule and what the correlation is of: ``all`` text, a ``domain`` or a ``layer``, named by label.

    correlation: Spearman's of a token's loss under the model as it is and its experts under the rule, with its
    interval; within a domain, of its own tokens. loss and active: means, for domains.
    """
    rows = []
    for one in document["rules"]:
        found = one["difficulty"]
        if found is None:
            continue
        rows.append({"trial": _name(one), "of": "all", "label": "all", **ends("correlation", found["correlation"])})
        for domain, part in found["per_domain"].items():
            row = {"trial": _name(one), "of": "domain", "label": domain, "tokens": part["tokens"], "loss": part["loss"]}
            rows.append(row | {**ends("active", part["active"]), **ends("correlation", part["correlation"])})
        for layer in found["layers"]:
            rows.append(
                {"trial": _name(one), "of": "layer", "label": _label(layer), **ends("correlation", layer)}
            )  # fmt: skip
    return pl.DataFrame(rows, schema=_HARD)


@of_a_document
def slimmability(document: Document) -> pl.DataFrame:
    """One row per pair of neighbouring numbers of experts: from, to, change of the loss with its interval (nats)."""
    schema = {"from": pl.Int64, "to": pl.Int64, **floats("change")}
    steps = (document["slimmability"] or {"steps": []})["steps"]
    return pl.DataFrame([{"from": one["from"], "to": one["to"], **ends("change", one["change"])} for one in steps],
                        schema=schema)  # fmt: skip


def _parts(one: Any) -> list[tuple[str, Any, Any]]:
    """(domain, figures, routing) over all text, then per domain."""
    routing = one["routing"]
    return [
        ("all", one, routing["all"]),
        *((domain, part, routing["per_domain"][domain]) for domain, part in one["per_domain"].items()),
    ]


def _routings(document: Document) -> list[tuple[str, Any]]:
    return [(_name(one), one["routing"]) for one in document["rules"]]


def _routing(part: Any) -> dict[str, float]:
    mean = {name: sum(part[name]) / len(part[name]) for name in ("mean", "kept", "changed")}
    return {
        "flops_share": part["flops_share"],
        "active": mean["mean"],
        "kept": mean["kept"],
        "changed": mean["changed"],
    }


def _name(row: Any) -> str:
    return Trial(row["rule"], row["value"], row["weights"]).name


def _label(layer: Any) -> str:
    return f"{layer['layer']}.{layer['step']}" if layer["step"] else str(layer["layer"])


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value)


def ends(name: str, found: Any) -> dict[str, float | None]:
    """An estimate of a document as the columns of :func:`floats`; null for what was not measured."""
    if found is None:
        return {f"{name}{end}": None for end in _ENDS}
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
