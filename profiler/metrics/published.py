"""Published local routing consistency of 20 models, to draw beside a run.

Source: arXiv 2505.16056. The numbers behind its figures are not printed; these were recovered from the vector figures
(marker centres) and agree with the tables that are printed to the last digit given. SRP within 0.01 percentage points;
hit rates within 0.002 for the models drawn with solid lines, up to 0.01 for those drawn dashed, so take 0.01.
Corpus: 11 domains, 22,528 sequences of 512 tokens, prefill only. Another corpus shifts single models by some points
and should keep their order.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from .cache_hit_rate import CachePolicy

SOURCE = "arXiv 2505.16056, recovered from the paper's vector figures"
SRP_PRECISION = 0.0001
HIT_RATE_PRECISION = 0.01


@dataclass(frozen=True)
class PublishedSrp:
    """SRP (0..1) and router size of one model at one segment length, model scope; precision: +- of the value."""

    model: str
    segment_length: int
    value: float
    router_size: float
    loss: float | None
    precision: float = SRP_PRECISION


@dataclass(frozen=True)
class PublishedHitRate:
    """Hit rate (0..1) of one cache shared by all layers with ratio x top_k x layers slots; mean over 11 domains.

    policy and segment_length (None but for "sch") as in ``hit_rate_curve``, convention "reference".
    """

    model: str
    policy: CachePolicy
    segment_length: int | None
    ratio: float
    value: float
    precision: float = HIT_RATE_PRECISION


@cache
def published_srp() -> tuple[PublishedSrp, ...]:
    """SRP of the published models at 4, 16, 64 and 256 tokens; loss: mean loss on the same corpus, nats."""
    losses = {row["model"]: float(row["mean_loss_nats"]) if row["mean_loss_nats"] else None for row in _rows("models")}
    return tuple(
        PublishedSrp(
            row["model"],
            int(row["segment_length"]),
            float(row["srp_percent"]) / 100.0,
            float(row["router_size"]),
            losses[row["model"]],
        )
        for row in _rows("srp")
    )


@cache
def published_hit_rates() -> tuple[PublishedHitRate, ...]:
    """SCH at 4 segment lengths, LRU, LFU and Belady of the published models at ratios 1, 2 and 3."""
    return tuple(
        PublishedHitRate(
            row["model"],
            row["policy"],  # type: ignore[arg-type]
            int(row["segment_length"]) if row["segment_length"] else None,
            float(row["ratio"]),
            float(row["hit_rate"]),
        )
        for row in _rows("hit_rates")
    )


def _rows(name: str) -> list[dict[str, str]]:
    """The rows of published_data/NAME.csv."""
    text = (files(__package__) / "published_data" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
