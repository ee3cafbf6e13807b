"""A sweep as text: the verdict, its tables, and what weakens it."""

from __future__ import annotations

from pathlib import Path

import polars as pl

import store
from app.frames import sweep as frames
from app.frames import sweep_studies as studies
from app.text import table


def words(document: store.Document, kept: Path | None) -> str:
    """What the command prints."""
    parts = [str(document["verdict"])]
    parts += [f"{title}\n{table(frame)}" for title, frame in tables(document)]
    parts += [str(note) for note in document["notes"]]
    if kept is not None:
        parts.append(f"kept in {kept}")
    return "\n\n".join(parts)


def tables(document: store.Document) -> list[tuple[str, pl.DataFrame]]:
    """What there is to print: titles and frames, without those that are empty."""
    whole = pl.col("domain") == "all"
    columns = ["trial", "flops_share", "active", "kept", "loss", "change", "change_low", "change_high", "kl",
               "agreement", "tokens_per_second"]  # fmt: skip
    every = frames.rules(document)
    apart = every.filter(~whole & (pl.col("rule") != "none"))
    pivot = apart.pivot(on="domain", index="trial", values="change") if len(apart) else pl.DataFrame()
    hard = frames.difficulty(document).filter(pl.col("of") != "layer").drop("active_low", "active_high")
    wide = ("kl", "agreement", "candidates", "base_accuracy", "accuracy", "base_loss", "loss")
    pairs = studies.contrast(document).drop(f"{name}_{end}" for name in wide for end in ("low", "high"))
    found = [
        ("Rules, all text (change: nats per token against the model as it is)", every.filter(whole).select(columns)),
        ("Change of the loss per domain, nats per token", pivot),
        ("Steps of k", frames.slimmability(document)),
        ("Experts against token loss (Spearman's correlation)", hard),
        ("Contrast", pairs.filter(whole)),
        ("Rerouting", studies.rerouting(document).filter(whole)),
        ("Items solved", studies.search(document).filter(whole).drop("k")),
    ]
    return [(words, frame) for words, frame in found if len(frame)]
