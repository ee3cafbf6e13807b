"""Where a run comes from, as rows that a report can print: model, text, capture, software."""

from __future__ import annotations

from typing import Any

import polars as pl

import store
from app.text import duration
from moescope import __version__

_SCHEMA = {"group": pl.String, "what": pl.String, "value": pl.String}
_UNKNOWN = "not known"


def provenance(run: store.Run) -> pl.DataFrame:
    """One row per fact, in reading order: group (model | text | capture | software), what, value as text."""
    rows = [*_model(run), *_text(run), *_capture(run), *_software(run)]
    return pl.DataFrame([(group, what, value or _UNKNOWN) for group, what, value in rows], schema=_SCHEMA, orient="row")


Rows = list[tuple[str, str, str]]


def _model(run: store.Run) -> Rows:
    info, layers = run.info, run.layers
    shape = f"{len(layers)} MoE layers"
    shape += f" of {info.num_layers} decoder layers" if info.num_layers else ""
    if layers:
        shape += f", {_range([one.num_experts for one in layers])} experts"
        shape += f", {_range([one.top_k for one in layers])} per token"
        shared = _range([one.num_shared for one in layers])
        shape += f", {shared} shared" if shared != "0" else ""
    imported = info.origin.startswith("import")
    revision = info.model_revision or ("" if imported else "a folder, without a revision")
    return [
        ("model", "model", info.model),
        ("model", "revision", revision),
        ("model", "fingerprint of the weights", info.model_fingerprint),
        ("model", "class", info.model_class or info.model_type),
        ("model", "shape", shape),
        ("model", "type of the weights", info.dtype),
    ]


def _text(run: store.Run) -> Rows:
    info, settings = run.info, run.info.settings
    files = [str(name) for name in settings.get("files") or [] if name] or [str(settings.get("file") or "")]
    shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
    domains = ", ".join(run.domains[:12]) + (f" and {len(run.domains) - 12} more" if len(run.domains) > 12 else "")
    return [
        ("text", "files", shown),
        ("text", "SHA-256 of the text", str(settings.get("corpus_sha256") or "")),
        ("text", "tokenizer", _tokenizer(settings)),
        ("text", "tokens", f"{info.tokens:,} in {info.sequences:,} sequences"),
        ("text", "domains", f"{len(run.domains)}: {domains}"),
        ("text", "sampling", _sampling(settings)),
        ("text", "kept in the run", "token ids and text" if info.text_kept else "neither text nor token ids"),
    ]


def _capture(run: store.Run) -> Rows:
    info = run.info
    counts = dict(run.table("check").group_by("status").len().sort("status").iter_rows())
    checks = ", ".join(f"{number} {status}" for status, number in counts.items())
    finished = "still being collected" if run.live else "yes" if info.complete else "no, it ended early"
    return [
        ("capture", "verdict", f"{run.badge.status}: {run.badge.reason}"),
        ("capture", "checks", checks or "none"),
        ("capture", "levels", info.levels),
        ("capture", "origin", info.origin),
        ("capture", "date (UTC)", f"{info.created_at:%Y-%m-%d %H:%M:%S}"),
        ("capture", "complete", finished),
        *_watching(info),
        *(("capture", f"the source cannot say: {subject}", reason) for subject, reason in run.omissions.items()),
    ]


def _watching(info: store.RunInfo) -> Rows:
    """What only a model that was watched has."""
    if info.origin.startswith("import"):
        return []
    return [
        ("capture", "time of the forwards", duration(info.seconds) if info.seconds else ""),
        ("capture", "measured overhead", _overhead(info.settings)),
    ]


def _software(run: store.Run) -> Rows:
    info = run.info
    return [
        ("software", "moescope", f"{info.tool_version} wrote the run, {__version__} this report"),
        ("software", "torch", info.torch_version),
        ("software", "transformers", info.transformers_version),
        ("software", "device", info.device),
        ("software", "experts backend", info.backend),
    ]


def _tokenizer(settings: dict[str, Any]) -> str:
    if not settings.get("corpus_sha256"):
        return str(settings.get("tokenizer") or "")
    named = str(settings.get("tokenizer") or "the model's own")
    bos = f"BOS {settings['bos_token']}" if settings.get("bos") and settings.get("bos_token") else "no BOS"
    return f"{named}; {bos}" + ("; chat template" if settings.get("messages_per_role") else "")


def _sampling(settings: dict[str, Any]) -> str:
    parts = []
    if settings.get("token_budget"):
        parts.append(f"budget {settings['token_budget']:,} tokens")
    if settings.get("sequence_length"):
        parts.append(f"sequences of at most {settings['sequence_length']:,}")
    if "packing" in settings:
        parts.append("packed" if settings["packing"] else "not packed")
    if settings.get("seed") is not None:
        parts.append(f"seed {settings['seed']}")
    return ", ".join(parts)


def _overhead(settings: dict[str, Any]) -> str:
    found = settings.get("overhead")
    if not isinstance(found, dict):
        return "not measured: collect --measure-overhead"
    value, low, high = (found.get(name) for name in ("value", "low", "high"))
    if not all(isinstance(one, int | float) for one in (value, low, high)):
        return ", ".join(f"{name} {one}" for name, one in found.items())
    return f"{value:+.1%} of the forwards' time ({low:+.1%} to {high:+.1%}, {found.get('rounds', '?')} rounds)"


def _range(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"
