"""Whether applied plans gave what they say: the self-checks beside a run."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app import model_check
from moescope.errors import StoreError

_WORST = {
    "layer": pl.Int64, "expert": pl.Int64, "role": pl.String, "part": pl.String, "bits": pl.String,
    "found": pl.Float64, "low": pl.Float64, "high": pl.Float64, "verdict": pl.String,
}  # fmt: skip
_FLIPS = {"layer": pl.Int64, "step": pl.Int64, "tokens": pl.Int64, "flips": pl.Float64, "kl": pl.Float64}


def document(run: store.Run, digest: str) -> dict[str, Any] | None:
    """The self-check of a plan that was applied; None where there is none that can be read.

    Args:
        run: the plan's run.
        digest: of the plan.
    """
    try:
        return store.read_plan_document(store.plan_path(run.path, "check", digest[:12]))
    except StoreError:
        return None


def verdict(document: dict[str, Any]) -> tuple[bool | None, str]:
    """(passed, sentence); None: nothing was looked at.

    Raises:
        StoreError: the document is damaged.
    """
    try:
        looked = document["weights"] is not None or document["logits"] is not None
        return (bool(document["passed"]) if looked or document["failure"] else None), model_check.words(document)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise StoreError(f"a self-check is damaged ({error!r}): apply the plan again") from error


def worst(document: dict[str, Any], *, count: int = 20) -> pl.DataFrame:
    """The matrices that are nearest to, or beyond, an end of what their width makes, the worst first: layer, expert,
    role, part, bits, found: ||Q(W) - W|| / ||W||, low and high: what passes, verdict.

    Raises:
        StoreError: the document is damaged.
    """
    try:
        rows = [{name: row[name] for name in _WORST} | {"bits": str(row["bits"])} for row in _rows(document)]
        frame = pl.DataFrame(rows, schema=_WORST)
    except (KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise StoreError(f"a self-check is damaged ({error!r}): apply the plan again") from error
    middle, reach = (pl.col("low") + pl.col("high")) / 2, (pl.col("high") - pl.col("low")) / 2
    away = (pl.col("found") - middle).abs() / pl.max_horizontal(reach, 1e-12)
    return frame.sort(pl.col("verdict") == "ok", -away).head(count)


def flips(document: dict[str, Any]) -> pl.DataFrame:
    """How the routers decide afterwards, a row per MoE layer: layer, step, tokens, flips: share of selections that are
    others than before, kl: nats per token.

    Raises:
        StoreError: the document is damaged.
    """
    try:
        rows = [{name: row[name] for name in _FLIPS} for row in document["routing"] or ()]
        return pl.DataFrame(rows, schema=_FLIPS)
    except (KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise StoreError(f"a self-check is damaged ({error!r}): apply the plan again") from error


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    return list((document["weights"] or {"rows": []})["rows"])
