"""What a machine can do with a model: offers of the memory planner as a table."""

from __future__ import annotations

import re

import polars as pl

from app.frames.caching import SHORT
from app.text import size
from planner.cache.ways import RESIDENT, WAYS
from planner.serving import Serving


def offers(found: Serving) -> pl.DataFrame:
    """One row per offer, in the advised order: #, way, experts, tokens/s, ms, 95 % interval, KL, what lies where.

    ``*`` behind the number: no other offer is both as fast and as cheap.
    """
    rows = []
    for place, one in enumerate(found.offers):
        device, ram, disk = (f"{count:,} ({size(taken)})" if count else "" for count, taken in
                             zip(one.experts, one.bytes, strict=True))  # fmt: skip
        rows.append(
            {
                "#": f"{place + 1}{'*' if place in found.front else ''}", "way": one.way, "experts": one.widths,
                "tokens/s": one.tokens_per_second, "ms": one.ms, "95 %": f"{one.low:.3g} to {one.high:.3g}",
                "KL": one.kl, "device": device, "host": ram, "disk": disk, "slowest domain": one.worst.domain,
                "its ms": one.worst.ms,
            }
        )  # fmt: skip
    schema = {"#": pl.String, "way": pl.String, "experts": pl.String, "tokens/s": pl.Float64, "ms": pl.Float64,
              "95 %": pl.String, "KL": pl.Float64, "device": pl.String, "host": pl.String, "disk": pl.String,
              "slowest domain": pl.String, "its ms": pl.Float64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def told(found: Serving) -> pl.DataFrame:
    """The offers as they are printed: short words, and the interval beside the time."""
    short = {way.title: SHORT[way.name] for way in (*WAYS, RESIDENT)}
    frame = offers(found)
    rows = [
        {
            "#": row["#"], "way": short.get(row["way"], row["way"].replace("LRU caches, prefetching by", "LRU +")),
            "experts": _few(row["experts"]),
            "tokens/s": row["tokens/s"], "ms per token": f"{row['ms']:.3g} ({row['95 %']})",
            "KL": None if row["KL"] is None else float(f"{row['KL']:.2g}"), "device": row["device"],
            "host": row["host"], "disk": row["disk"],
            "slowest domain": f"{row['slowest domain']}, {row['its ms']:.3g} ms",
        }
        for row in frame.to_dicts()
    ]  # fmt: skip
    table = pl.DataFrame(rows, schema_overrides={"KL": pl.Float64})
    return table.select(name for name in table.columns if name not in ("host", "disk") or any(table[name]))


def _few(widths: str) -> str:
    """``in 4 bits on the device and 2 elsewhere`` as ``4 + 2 bits``, as docs/caching.md writes it."""
    words = re.sub(r"(\d+) bits on the device and (\d+) elsewhere", r"\1 + \2 bits", widths)
    return words.removeprefix("in ").split(", by ")[0]
