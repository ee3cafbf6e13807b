"""What switching experts off did, from the documents beside a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import polars as pl

import store
from app.frames.sweep import DAMAGED
from moescope.errors import StoreError
from profiler.ablation import Expert

Document = Mapping[str, Any]
Result = TypeVar("Result")

_PASSES = {
    "experts": pl.String,
    "what": pl.String,
    "seed": pl.Int64,
    "switched_off": pl.String,
    "perplexity": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "ratio": pl.Float64,
    "ratio_low": pl.Float64,
    "ratio_high": pl.Float64,
    "sink_decay": pl.Float64,
    "residual_max": pl.Float64,
    "tokens": pl.Int64,
}
_LAYERS = {
    "layer": pl.Int64,
    "sink": pl.Float64,
    "sink_ablated": pl.Float64,
    "sink_decay": pl.Float64,
    "control_sink_decay": pl.Float64,
    "residual_max": pl.Float64,
    "residual_max_ablated": pl.Float64,
    "massive": pl.Boolean,
    "massive_ablated": pl.Boolean,
}


def _of_a_document(read: Callable[..., Result]) -> Callable[..., Result]:
    """A document that someone has edited lacks what it should have: that is an error of the store, not of ours."""

    @wraps(read)
    def checked(document: Document) -> Result:
        try:
            return read(document)
        except DAMAGED as error:
            raise StoreError(
                f"an ablation beside the run is damaged ({error!r:.200}): run moescope ablate again"
            ) from error

    return checked


def documents(run: store.Run) -> list[dict[str, Any]]:
    """The ablations beside a run, the newest first.

    Raises:
        StoreError: one cannot be read.
    """
    return [store.read_evaluation(path) for path in store.list_evaluations(run.path, "ablation")]


def ablations(run: store.Run) -> pl.DataFrame:
    """:func:`passes` of all ablations beside a run."""
    parts = [passes(document) for document in documents(run)]
    return pl.concat(parts) if parts else pl.DataFrame(schema=_PASSES)


def names(experts: list[dict[str, Any]]) -> str:
    """Experts as a comma list, as the command line takes them."""
    return ",".join(str(Expert(**expert)) for expert in experts)


@_of_a_document
def title(document: Document) -> str:
    """What was switched off, and on how much text."""
    return f"{names(document['experts'])} on {document['base']['perplexity']['tokens']:,} tokens"


@_of_a_document
def passes(document: Document) -> pl.DataFrame:
    """One row per reading of the text, the unchanged model first.

    Columns: experts: the chosen ones; what: base | ablated | random | same layers; seed of a control; switched_off;
    perplexity with its interval; ratio to the base with the interval of the pairs; sink_decay: mean over layers;
    residual_max: the largest hidden state of any layer; tokens that were predicted.
    """
    chosen = names(document["experts"])
    rows = []
    for one in (document["base"], document["ablated"], *document["controls"]):
        found, ratio = one["perplexity"], one["ratio"]
        row = {"experts": chosen, "what": one["name"], "seed": one["seed"], "switched_off": names(one["experts"])}
        row |= {"perplexity": found["value"], "low": found["low"], "high": found["high"], "tokens": found["tokens"]}
        row |= {"ratio": ratio["value"], "ratio_low": ratio["low"], "ratio_high": ratio["high"]}
        row |= {"sink_decay": one["sink_decay"], "residual_max": one["residual_max"]}
        rows.append(row)
    return pl.DataFrame(rows, schema=_PASSES)


@_of_a_document
def layers(document: Document) -> pl.DataFrame:
    """One row per decoder layer: attention sink and largest hidden state, before and after.

    Columns: layer; sink, sink_ablated: mean attention on position 0; sink_decay: D_sink; control_sink_decay: the
    largest of any control; residual_max, residual_max_ablated; massive, massive_ablated.
    """
    rows = [{name: row[name] for name in _LAYERS} for row in document["layers"]]
    return pl.DataFrame(rows, schema=_LAYERS)


@_of_a_document
def domains(document: Document) -> pl.DataFrame:
    """One row per domain: domain, base and ablated perplexity, ratio, tokens."""
    base, ablated = document["base"]["per_domain"], document["ablated"]["per_domain"]
    rows = [
        {
            "domain": name,
            "base": base[name]["value"],
            "ablated": ablated[name]["value"],
            "ratio": ablated[name]["value"] / base[name]["value"] if base[name]["value"] else None,
            "tokens": base[name]["tokens"],
        }
        for name in base
    ]
    schema = {"domain": pl.String, "base": pl.Float64, "ablated": pl.Float64, "ratio": pl.Float64, "tokens": pl.Int64}
    return pl.DataFrame(rows, schema=schema).sort("ratio", descending=True, nulls_last=True)


@_of_a_document
def sentences(document: Document) -> tuple[bool | None, str, list[str]]:
    """Whether the experts matter more than the controls, the verdict in words, and what weakens it."""
    verdict = document["verdict"]
    return verdict["more_than_controls"], str(verdict["sentence"]), [str(note) for note in document["notes"]]
