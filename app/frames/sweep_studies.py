"""What the studies of a sweep say: self-contrast, rerouting fitted on the text so far, items solved over several k."""

from __future__ import annotations

from typing import Any

import polars as pl

from app.frames.sweep import Document, ends, floats, of_a_document

_CONTRAST: dict[str, Any] = {
    "rank": pl.Int64, "alpha": pl.Float64, "beta": pl.Float64, "domain": pl.String, "tokens": pl.Int64,
    **floats("kl", "agreement", "candidates", "base_accuracy", "accuracy", "difference"),
    **floats("base_loss", "loss", "change"),
}  # fmt: skip
_REROUTING: dict[str, Any] = {
    "domain": pl.String, "vectors": pl.String, "tokens": pl.Int64, **floats("loss", "change", "ahead"),
}  # fmt: skip
_SEARCH: dict[str, Any] = {
    "domain": pl.String, "branches": pl.String, "k": pl.Int64, "items": pl.Int64, **floats("solved"),
}  # fmt: skip


@of_a_document
def contrast(document: Document) -> pl.DataFrame:
    """One row per rank, strength and domain (``all`` first).

    Columns: rank, alpha, beta, domain, tokens; kl: KL(strong || weak), nats per token, and agreement of the likeliest
    token; candidates: share of tokens whose next token is a candidate; base_accuracy, accuracy, difference of the next
    token, teacher-forced; base_loss, loss, change over tokens whose next token is a candidate; all with intervals.
    """
    rows = []
    for one in document["contrast"] or ():
        for domain, part in (("all", one), *one["per_domain"].items()):
            shared = {"rank": one["rank"], "alpha": one["alpha"], "domain": domain, "tokens": part["tokens"]}
            for name in ("kl", "agreement", "candidates", "base_accuracy", "base_loss"):
                shared |= ends(name, part[name])
            for beta in part["betas"]:
                row = {**shared, "beta": beta["beta"]}
                for name in ("accuracy", "difference", "loss", "change"):
                    row |= ends(name, beta[name])
                rows.append(row)
    return pl.DataFrame(rows, schema=_CONTRAST)


@of_a_document
def rerouting(document: Document) -> pl.DataFrame:
    """One row per domain (``all`` first) and kind of vectors: none, fitted, random (as long), other (fitted elsewhere).

    Columns: loss of what follows, change against none, ahead: the fitted vectors' loss less this kind's (below 0 = the
    fitted ones are better), nats per token, paired over sequences, with intervals.
    """
    found = document["rerouting"]
    rows = []
    for domain, part in () if found is None else (("all", found), *found["per_domain"].items()):
        for name, kind in part["conditions"].items():
            row = {"domain": domain, "vectors": name, "tokens": part["tokens"], **ends("loss", kind["loss"])}
            ahead = {"none": part["conditions"]["fitted"]["change"], "random": part["against_random"],
                     "other": part["against_other"], "fitted": None}[name]  # fmt: skip
            rows.append(row | {**ends("change", kind["change"]), **ends("ahead", ahead)})
    return pl.DataFrame(rows, schema=_REROUTING)


@of_a_document
def search(document: Document) -> pl.DataFrame:
    """One row per domain (``all`` first) and kind of branches: a number of experts k, their union, samples at equal
    FLOPs, samples that read their prompt once, and the difference of union and samples; solved: share of the items."""
    found = document["search"]
    rows: list[dict[str, Any]] = []
    for domain, part in () if found is None else (("all", found), *found["per_domain"].items()):
        shared = {"domain": domain, "items": part["items"]}
        rows += [{**shared, "branches": f"k = {one['k']}", "k": one["k"], **ends("solved", one["solved"])}
                 for one in part["counts"]]  # fmt: skip
        for words, name in (
            ("any of these k", "union"),
            (f"any of {found['samples']} samples", "sampled"),
            (f"any of {found['samples_sharing']} samples of one prompt", "sampled_sharing"),
            ("k less samples", "difference"),
        ):
            rows.append({**shared, "branches": words, **ends("solved", part[name])})
    return pl.DataFrame(rows, schema=_SEARCH)


@of_a_document
def jaccard(document: Document) -> pl.DataFrame:
    """One row per pair of numbers of experts: first, second, value: items that both solve over those that one does."""
    found = (document["search"] or {"jaccard": []})["jaccard"]
    return pl.DataFrame(found, schema={"first": pl.Int64, "second": pl.Int64, "value": pl.Float64})
