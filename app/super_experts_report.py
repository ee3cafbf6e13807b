"""Super experts as the published code of their paper writes them: JSON files for tools that read those.

Source: the code of "Unveiling super experts in mixture-of-experts large language models" (arXiv 2507.23279). Names and
keys of files and entries are its own. Where it appends to files that are there, here they are replaced: entries that
stand twice shift its percentile. Experts that no token reached are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl

import store
from app.frames import super_experts
from moescope.errors import InputError

REPORT = "super_experts_info/super_experts_report/Super Experts Report.json"
OUTLIERS = "outliers_info"
SHARED = "shared_experts"
"""What stands for a number where the shared experts are meant."""

Entries = list[dict[str, Any]]


def report(run: store.Run) -> Entries:
    """The super experts by the code's rule, the largest output first: expert_index, layer_index, output_max, rank."""
    found = super_experts.super_experts(run).filter((pl.col("rule") == "code") & (pl.col("tokens") == "all"))
    ranked = found.sort("value", descending=True).select("expert", "layer", "kind", "value").iter_rows()
    return [
        {
            "expert_index": SHARED if kind == "shared" else expert,
            "layer_index": layer,
            "output_max": value,
            "rank": rank,
        }
        for rank, (expert, layer, kind, value) in enumerate(ranked, start=1)
    ]


def outliers(run: store.Run) -> dict[int, Entries]:
    """Per MoE layer, the maxima of every expert, routed ones first and the shared ones last.

    Entries hold layer_index (text, as the code has it), layer_type (name of the module), input_max, output_max and
    output_max_channel. Unlike the code's, the channel of shared experts is one too.
    """
    table = (
        run.table("expert_output").sort("output_max").group_by("layer", "step", "kind", "expert", maintain_order=True)
    )
    top = table.agg(pl.col("input_max").max(), pl.col("output_max").last(), pl.col("output_max_channel").last()).sort(
        "layer", "step", "kind", "expert"
    )
    modules = {(layer.layer, layer.step): layer.module for layer in run.layers}
    found: dict[int, Entries] = {}
    for row in top.iter_rows(named=True):
        entry = {
            "layer_index": str(row["layer"]),
            "layer_type": _module(modules[row["layer"], row["step"]], row["kind"], row["expert"]),
            "input_max": row["input_max"],
            "output_max": row["output_max"],
            "output_max_channel": row["output_max_channel"],
        }
        found.setdefault(row["layer"], []).append(entry)
    return found


def write(run: store.Run, directory: Path) -> list[Path]:
    """Write all files below a directory, which is made if it is not there.

    Raises:
        InputError: the run has no expert outputs, or the directory cannot be written.
    """
    layers = outliers(run)
    if not layers:
        raise InputError(f"run {run.name!r} holds no expert outputs: collect it with --level routing,activations")
    contents: dict[str, Any] = {REPORT: report(run)}
    contents |= {f"{OUTLIERS}/layer_{layer}.json": entries for layer, entries in layers.items()}
    paths = []
    for name, content in contents.items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=4), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        paths.append(path)
    return paths


def _module(experts: str, kind: str, expert: int) -> str:
    """The name of an expert's second projection in its decoder layer, as models with a module per expert have it."""
    inside = re.sub(r"^.*?\.\d+\.", "", experts)
    if kind == "shared":
        return f"{inside.rpartition('.')[0]}.{SHARED}.down_proj".lstrip(".")
    return f"{inside}.{expert}.down_proj"
