"""What differs between two runs, from what they say of themselves, and which kind of comparison that makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import polars as pl

import store
from app.frames.comparison_made import Link
from compressor.plan import Plan, experts_after

_LENGTH = 12
"""Digits of a SHA-256 that are shown."""


@dataclass(frozen=True)
class Kind:
    """Which kind of comparison two runs make.

    Attributes:
        words: a few words, such as "base and compressed by a plan".
        meaning: what differences mean here, in a sentence or two.
    """

    words: str
    meaning: str


def provenance(first: store.Run, second: store.Run, *, link: Link | None = None) -> pl.DataFrame:
    """One row per part of the provenance: what, first, second, verdict ("differs", "same", "not known").

    Empty texts stand for what a run does not say; what neither says is left out. Those that differ come first.
    """
    rows = []
    for what, read in _PARTS.items():
        values = tuple(read(run) for run in (first, second))
        if values == ("", ""):
            continue
        verdict = "not known" if "" in values else "same" if values[0] == values[1] else "differs"
        rows.append((what, *values, verdict))
    if link is not None:
        applied = done(link.load())
        values = ("", applied) if link.base == "first" else (applied, "")
        rows.insert(1, ("plan applied", *(value or "none" for value in values), "differs"))
    order = {"differs": 0, "not known": 1, "same": 2}
    rows.sort(key=lambda row: order[row[3]])
    return pl.DataFrame(rows, schema=dict.fromkeys(("what", "first", "second", "verdict"), pl.String), orient="row")


def kind(first: store.Run, second: store.Run, *, link: Link | None = None) -> Kind:
    """The kind of comparison; the first of these that fits: by a plan, engines, other model, precision, checkpoints,
    the same weights."""
    one, other = first.info, second.info
    if link is not None:
        base, model = (first, second) if link.base == "first" else (second, first)
        plan = link.load()
        cut = any(step.step in ("drop", "merge") for step in plan.for_checkpoint)
        return Kind(
            f"base and compressed by a plan: {done(plan)}",
            f"{model.name} was made of {base.name}'s model. "
            + ("Tokens that used what is gone must flip; others flip" if cut else "The router is the same: tokens flip")
            + " since the layers before put out something else.",
        )
    engines = [info.origin.removeprefix("import ") if info.origin.startswith("import") else "" for info in (one, other)]
    if engines[0] != engines[1]:
        named = " and ".join(name or "transformers" for name in engines)
        return Kind(
            f"two engines: {named}",
            "One model should route alike in both but for rounding, which flips tokens at small margins only. More "
            "says that kernels, weights or the text before a token differ.",
        )
    if _shape(first) != _shape(second) or (one.model_type and other.model_type and one.model_type != other.model_type):
        return Kind(
            "two models of other shapes",
            "Their experts have nothing to do with each other, and no document beside the runs says which became "
            "which. How evenly each uses its experts can still be set side by side.",
        )
    widths = [_precision(info) for info in (one, other)]
    if widths[0] != widths[1] and _model(first) == _model(second):
        return Kind(
            f"one model in two precisions: {widths[0] or 'not known'} and {widths[1] or 'not known'}",
            "Rounding moves the router's logits a little: flips belong at small margins, and add up from layer to "
            "layer. Flips at large margins mean that the weights were hurt, not rounded.",
        )
    if one.model_fingerprint and one.model_fingerprint == other.model_fingerprint:
        return Kind(
            "the same weights twice",
            "Nothing but the text, the batches or the machine differs: the same tokens should route alike, and what "
            "flips shows how much of a difference is noise.",
        )
    return Kind(
        "two checkpoints of one shape",
        "Training has moved routers and their inputs. The agreement of the earlier with the later one is router "
        "saturation: how much of the later routing was there already.",
    )


def done(plan: Plan) -> str:
    """What a plan does, in a few words."""
    before = sum(shape.num_experts for shape in plan.source.layers)
    after = sum(len(experts) for experts in experts_after(plan).values())
    words = []
    steps = {step.step for step in plan.for_checkpoint}
    gone = f"{before - after:,} of {before:,} experts"
    if "merge" in steps:
        words.append(f"merges {gone} into others")
    elif "drop" in steps:
        words.append(f"drops {gone}" if after < before else "empties MoE blocks")
    if "slim" in steps:
        words.append("slims experts")
    if "factor" in steps:
        words.append("factors experts")
    if "quantize" in steps:
        bits = plan.target.bits or plan.estimate.bits
        words.append(f"quantizes to {bits:.3g} bits" if bits else "quantizes")
    return f"{', '.join(words) or 'changes no weight'} ({plan.target.preset})"


def _shape(run: store.Run) -> list[tuple[int, int, int]]:
    return [(one.layer, one.step, one.num_experts) for one in run.layers]


def _model(run: store.Run) -> str:
    return PurePath(run.info.model.replace("\\", "/")).name


def _precision(info: store.RunInfo) -> str:
    """The type of the weights: as computed with, or as stored where they were unpacked from less."""
    weights = info.settings.get("weights")
    stored = str((weights or {}).get("stored") or "") if isinstance(weights, dict) else ""
    method = info.model_config.get("quantization_config")
    named = str(method.get("quant_method") or "") if isinstance(method, dict) else ""
    return stored or named or info.dtype or str(info.model_config.get("torch_dtype") or "")


def _experts(run: store.Run) -> str:
    counts = sorted({one.num_experts for one in run.layers})
    used = sorted({one.top_k for one in run.layers})
    if not counts:
        return ""
    spans = [f"{values[0]} to {values[-1]}" if len(values) > 1 else str(values[0]) for values in (counts, used)]
    return f"{len(run.layers)} MoE layers of {spans[0]} experts, {spans[1]} per token"


def _engine(run: store.Run) -> str:
    info = run.info
    if info.origin.startswith("import"):
        return info.origin
    version = f"transformers {info.transformers_version}" if info.transformers_version else ""
    return ", ".join(part for part in (version, info.backend) if part)


def _corpus(run: store.Run) -> str:
    return str(run.info.settings.get("corpus_sha256") or "")[:_LENGTH]


_PARTS: dict[str, Callable[[store.Run], Any]] = {
    "model": lambda run: run.info.model,
    "revision": lambda run: run.info.model_revision,
    "fingerprint": lambda run: run.info.model_fingerprint[:_LENGTH],
    "weights as computed": lambda run: run.info.dtype,
    "weights as stored": lambda run: _precision(run.info) if _precision(run.info) != run.info.dtype else "",
    "engine": _engine,
    "device": lambda run: run.info.device,
    "shape": _experts,
    "text (SHA-256)": _corpus,
    "tokens": lambda run: f"{run.info.tokens:,}",
    "domains": lambda run: ", ".join(run.domains),
    "recorded": lambda run: run.info.levels,
    "collected": lambda run: f"{run.info.created_at:%Y-%m-%d %H:%M} UTC",
    "capture": lambda run: run.badge.status,
    "moescope": lambda run: run.info.tool_version,
}
"""How each part is read; an empty text stands for what a run does not say."""
