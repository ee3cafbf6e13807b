"""What a model has lost against its base, from the documents that ``moescope evaluate`` leaves beside a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import polars as pl

import store
from app.frames.sweep import DAMAGED
from moescope.errors import StoreError

Document = Mapping[str, Any]
Result = TypeVar("Result")

_TEXTS = {
    "repeated_4grams": "repeated 4-grams",
    "longest_loop": "longest loop, tokens",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "entropy": "entropy, nats",
    "length": "length, tokens",
}
_SIZES = {
    "file_bytes": "weights in files, MiB",
    "memory_bytes": "weights in memory, MiB",
    "parameters": "parameters, M",
    "active_parameters": "active per token, M",
    "expert_parameters": "of routed experts, M",
    "experts": "routed experts",
}


def _of_a_document(read: Callable[..., Result]) -> Callable[..., Result]:
    """A document that someone has edited lacks what it should have: that is an error of the store, not of ours."""

    @wraps(read)
    def checked(document: Document) -> Result:
        try:
            return read(document)
        except DAMAGED as error:
            raise StoreError(f"an evaluation is damaged ({error!r:.200}): run moescope evaluate again") from error

    return checked


def documents(run: store.Run) -> list[dict[str, Any]]:
    """The evaluations beside a run, the newest first.

    Raises:
        StoreError: one cannot be read.
    """
    return [store.read_evaluation(path) for path in store.list_evaluations(run.path, "evaluation")]


def evaluations(run: store.Run) -> pl.DataFrame:
    """One row per evaluation beside a run: model, base, plan, held_out, tokens, KL, perplexity ratio, agreement."""
    return pl.DataFrame([summary(document) for document in documents(run)], schema=_SUMMARY)


_SUMMARY = {
    "model": pl.String, "base": pl.String, "plan": pl.String, "held_out": pl.Boolean, "tokens": pl.Int64,
    "kl": pl.Float64, "kl_low": pl.Float64, "kl_high": pl.Float64,
    "ratio": pl.Float64, "ratio_low": pl.Float64, "ratio_high": pl.Float64, "agreement": pl.Float64,
}  # fmt: skip


@_of_a_document
def summary(document: Document) -> dict[str, Any]:
    """One evaluation as a row, see :func:`evaluations`."""
    found = document["divergence"]
    return {
        "model": document["model"]["name"],
        "base": document["base"]["name"],
        "plan": document["plan"],
        "held_out": document["held_out"],
        "tokens": found["tokens"],
        **_ends("kl", found["kl"]),
        **_ends("ratio", found["ratio"]),
        "agreement": found["agreement"]["value"],
    }


@_of_a_document
def domains(document: Document) -> pl.DataFrame:
    """One row for all text and one per domain, the most damaged first.

    Columns: domain, tokens, kl with its interval (nats), perplexity of base and model, their ratio with the interval of
    the pairs, top1: share of tokens with the same likeliest token, routing: share of selections that agree.
    """
    whole, found, routing = document["divergence"], document["perplexity"], document["routing"]
    rows = [_domain("all", whole, found["base"], found["model"], routing and routing["whole"])]
    for name, part in sorted(whole["per_domain"].items(), key=lambda item: -item[1]["kl"]["value"]):
        base, model = (found[who]["per_domain"][name] for who in ("base", "model"))
        rows.append(_domain(name, part, base, model, routing and routing["per_domain"].get(name)))
    return pl.DataFrame(rows, schema_overrides={"kl_low": pl.Float64, "kl_high": pl.Float64, "routing": pl.Float64})


@_of_a_document
def layers(document: Document) -> pl.DataFrame:
    """One row per MoE layer of the base that is left: agreement of the selections, forced and free flips.

    Columns: layer, step, agreement with its interval, forced: share of selections whose expert is gone, free: of the
    others, the share that went elsewhere, with its interval. Empty where routing was not compared.
    """
    schema = {"layer": pl.Int64, "step": pl.Int64, **dict.fromkeys(_LAYER, pl.Float64)}
    rows = [
        {
            "layer": row["layer"],
            "step": row["step"],
            **_ends("agreement", row["agreement"]),
            "forced": row["forced"]["value"],
            **_ends("free", row["free"]),
        }
        for row in (document["routing"] or {"layers": []})["layers"]
    ]
    return pl.DataFrame(rows, schema=schema)


_LAYER = ("agreement", "agreement_low", "agreement_high", "forced", "free", "free_low", "free_high")


@_of_a_document
def probes(document: Document) -> pl.DataFrame:
    """One row per probe: probe, asks, items, base and model accuracy, difference with its interval, enough."""
    schema = {"probe": pl.String, "items": pl.Int64, "base": pl.Float64, "model": pl.Float64, "difference": pl.Float64,
              "difference_low": pl.Float64, "difference_high": pl.Float64, "enough": pl.Boolean,
              "asks": pl.String}  # fmt: skip
    rows = [
        {
            "probe": one["name"],
            "items": one["items"],
            "base": one["base_accuracy"]["value"],
            "model": one["accuracy"]["value"],
            **_ends("difference", one["difference"]),
            "enough": one["enough"],
            "asks": one["asks"],
        }
        for one in document["probes"]
    ]
    return pl.DataFrame(rows, schema=schema)


@_of_a_document
def generation(document: Document) -> pl.DataFrame:
    """One row per measure of greedy continuations: measure, base, model, difference with its interval.

    For the perplexity of the base on both texts the difference is a ratio. Empty where nothing was generated.
    """
    schema = {"measure": pl.String, **dict.fromkeys(_GENERATION, pl.Float64)}
    found = document["generation"]
    if found is None:
        return pl.DataFrame(schema=schema)
    rows = [
        {"measure": title, "base": part["base"]["value"], "model": part["model"]["value"],
         **_ends("difference", part["difference"])}
        for name, title in _TEXTS.items()
        for part in (found["measures"][name],)
    ]  # fmt: skip
    loss = found["measures"]["base_loss"]
    ratio = {name: value and math.exp(value) for name, value in _ends("difference", loss["difference"]).items()}
    perplexities = {who: math.exp(loss[who]["value"]) for who in ("base", "model")}
    rows.append({"measure": "perplexity of the base on it (ratio)", **perplexities, **ratio})
    rows.append({"measure": "alike at the beginning, tokens", "model": found["common"]["value"]})
    rows.append({"measure": "alike to the end, share", "model": found["identical"]["value"]})
    return pl.DataFrame(rows, schema=schema)


_GENERATION = ("base", "model", "difference", "difference_low", "difference_high")


@_of_a_document
def sizes(document: Document) -> pl.DataFrame:
    """One row per figure of size and speed: figure, base, model, ratio (and its interval for speed)."""
    size, rows = document["size"], []
    for name, title in _SIZES.items():
        unit = 2**20 if name.endswith("bytes") else 10**6 if name.endswith("parameters") else 1
        base, model = ((None if size[who][name] is None else size[who][name] / unit) for who in ("base", "model"))
        ratio = model / base if base and model is not None else None
        rows.append({"figure": title, "base": base, "model": model, "ratio": ratio})
    for phase, found in (document["speed"] or {}).items():
        row = {"figure": f"{phase}, tokens/s", "base": found["base"]["value"], "model": found["model"]["value"]}
        rows.append({**row, **_ends("ratio", found["ratio"])})
    schema = {"figure": pl.String, **dict.fromkeys(("base", "model", "ratio", "ratio_low", "ratio_high"), pl.Float64)}
    return pl.DataFrame(rows, schema=schema)


@_of_a_document
def benchmarks(document: Document) -> pl.DataFrame:
    """One row per metric of lm-evaluation-harness: task, metric, base, model. Empty where it was not asked for."""
    found = document.get("lm_eval") or {"results": {"base": {}, "model": {}}}
    rows = [
        {"task": task, "metric": metric, "base": value, "model": found["results"]["model"].get(task, {}).get(metric)}
        for task, values in found["results"]["base"].items()
        for metric, value in values.items()
    ]
    schema = {"task": pl.String, "metric": pl.String, "base": pl.Float64, "model": pl.Float64}
    return pl.DataFrame(rows, schema=schema)


@_of_a_document
def sentences(document: Document) -> tuple[str, list[str]]:
    """The verdict in words, and what weakens it."""
    return str(document["verdict"]), [str(note) for note in document["notes"]]


def _domain(name: str, found: Any, base: Any, model: Any, routing: Any) -> dict[str, Any]:
    return {
        "domain": name,
        "tokens": found["tokens"],
        **_ends("kl", found["kl"]),
        "base": base["value"],
        "model": model["value"],
        **_ends("ratio", found["ratio"]),
        "top1": found["agreement"]["value"],
        "routing": routing["agreement"]["value"] if routing else None,
    }


def _ends(name: str, found: Any) -> dict[str, float | None]:
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
