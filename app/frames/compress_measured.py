"""What following plans of a run did to the model, from the evaluations beside the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import polars as pl

import store
from app.frames.compress import title
from compressor.plan import Plan
from moescope.errors import PlanError, StoreError

Document = Mapping[str, Any]
Result = TypeVar("Result")

ALL = "all text"
_DAMAGE = ("domain", "tokens", "kl", "kl_low", "kl_high", "ratio", "ratio_low", "ratio_high", "agreement",
           "agreement_low", "agreement_high", "base_perplexity", "perplexity")  # fmt: skip
_GENERATION = ("measure", "base", "model", "difference", "low", "high")
_PROBES = ("probe", "asks", "items", "enough", "base", "base_low", "base_high", "model", "model_low", "model_high",
           "difference", "low", "high")  # fmt: skip
_WORDS = ("measure", "probe", "asks", "domain")
_COUNTS = ("tokens", "items")


def _of_a_document(read: Callable[..., Result]) -> Callable[..., Result]:
    """A document that someone has edited lacks what it should have: that is an error of the store, not of ours."""

    @wraps(read)
    def checked(document: Document) -> Result:
        try:
            return read(document)
        except (AttributeError, KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise StoreError(
                f"an evaluation beside the run is damaged ({error!r}): run moescope evaluate again"
            ) from error

    return checked


def documents(run: store.Run) -> dict[str, dict[str, Any]]:
    """The evaluations of this run's plans by a title of their own, the newest first; those of other plans are left out.

    Raises:
        StoreError: one cannot be read.
    """
    plans = plan_titles(run)
    found: dict[str, dict[str, Any]] = {}
    for path in store.list_evaluations(run.path, "evaluation"):
        document = store.read_evaluation(path)
        digest = document["plan"]
        if digest in plans:
            held_out = "" if document["held_out"] else ", not held out"
            words = f"{plans[digest]} ({digest[:6]}{held_out})"
            found[words if words not in found else f"{words} {path.stem[-6:]}"] = document
    return found


def plan_titles(run: store.Run) -> dict[str, str]:
    """Digest -> title of the plans beside a run; files that are none are left out."""
    found = {}
    for path in store.list_plans(run.path):
        try:
            plan = Plan.parse(store.read_plan(path), path.name)
        except (PlanError, StoreError):
            continue
        found[plan.digest] = title(plan)
    return found


def measured(run: store.Run) -> pl.DataFrame:
    """One row per evaluation of a plan of this run: plan, then the columns of :func:`damage` over all text, verdict."""
    rows = []
    for words, document in documents(run).items():
        row = damage(document).row(0, named=True)
        rows.append({"plan": words, **row, "verdict": str(document.get("verdict", ""))})
    schema = {"plan": pl.String, **_schema(_DAMAGE), "verdict": pl.String}
    return pl.DataFrame(rows, schema=schema)


@_of_a_document
def damage(document: Document) -> pl.DataFrame:
    """One row for all text and one per domain: domain, predicted tokens; kl in nats per token; ratio of the
    perplexities; agreement: share of tokens with the same likeliest next token; each with its 95 % interval;
    base_perplexity, perplexity.
    """
    whole, perplexity = document["divergence"], document["perplexity"]
    parts = {ALL: whole, **whole["per_domain"]}
    rows = []
    for name, part in parts.items():
        row: dict[str, Any] = {"domain": name, "tokens": part["tokens"]}
        for key in ("kl", "ratio", "agreement"):
            row |= {key: part[key]["value"], f"{key}_low": part[key]["low"], f"{key}_high": part[key]["high"]}
        for key, side in (("base_perplexity", "base"), ("perplexity", "model")):
            found = perplexity[side] if name == ALL else perplexity[side]["per_domain"].get(name, {})
            row[key] = found.get("value")
        rows.append(row)
    return pl.DataFrame(rows, schema=_schema(_DAMAGE))


@_of_a_document
def generation(document: Document) -> pl.DataFrame:
    """What both models write greedily: measure, base, model, difference with its interval; empty where skipped."""
    found = document["generation"]
    rows = []
    if found is not None:
        for name, words in (("common", "tokens alike from the start"), ("identical", "continuations alike to the end")):
            rows.append({"measure": words, "model": found[name]["value"], "low": found[name]["low"],
                         "high": found[name]["high"]})  # fmt: skip
        for name, part in found["measures"].items():
            change = part["difference"]
            rows.append(
                {"measure": name.replace("_", " "), "base": part["base"]["value"], "model": part["model"]["value"],
                 "difference": change["value"], "low": change["low"], "high": change["high"]}
            )  # fmt: skip
    return pl.DataFrame(rows, schema=_schema(_GENERATION))


@_of_a_document
def probes(document: Document) -> pl.DataFrame:
    """One row per probe: probe, what it asks, items, enough to say something, accuracy of both and their difference,
    each with its interval; empty where they were skipped.
    """
    rows = []
    for found in document["probes"]:
        row: dict[str, Any] = {
            "probe": found["name"].replace("_", " "),
            "asks": found["asks"],
            "items": found["items"],
            "enough": str(found["enough"]),
        }
        for name, key in (("base", "base_accuracy"), ("model", "accuracy")):
            part = found[key]
            row |= {name: part["value"], f"{name}_low": part["low"], f"{name}_high": part["high"]}
        change = found["difference"]
        rows.append({**row, "difference": change["value"], "low": change["low"], "high": change["high"]})
    return pl.DataFrame(rows, schema=_schema(_PROBES)).with_columns(pl.col("enough") == "True")


@_of_a_document
def sentences(document: Document) -> list[str]:
    """The verdict, and what weakens it."""
    return [str(document["verdict"]), *(str(note) for note in document["notes"])]


def _schema(names: tuple[str, ...]) -> dict[str, Any]:
    kinds: dict[str, Any] = dict.fromkeys(names, pl.Float64)
    for name in names:
        if name in (*_WORDS, "enough"):
            kinds[name] = pl.String
        elif name in _COUNTS:
            kinds[name] = pl.Int64
    return kinds
