"""BigMoeOnEdge, `--route-trace FILE`: a line per selection, with the columns `turn`, `phase`, `step`, `layer`, `slot`,
`expert`, `weight` and others that are not read; lines that begin with `#` name the model, its experts per layer and per
token. Each turn of a session becomes a sequence. Experts that the engine left out (`dropped`) count as "none". In the
last layer the engine routes only the last token of a prompt; the other prompt tokens have no expert there, and a check
says so. Weights that the graph did not show (`nan`) are missing for the whole run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from moescope.errors import ImportFileError
from profiler.importers.format import Format
from profiler.importers.recording import BLOCK_TOKENS, ImportOptions, Recording, TraceBlock
from profiler.importers.shape import Axis, layer_axis

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert")
MAX_BYTES = 1 << 31
"""The file is read at once; a session on a small device writes some megabytes."""


def read(path: Path, options: ImportOptions) -> Recording:
    """Open a route trace.

    Raises:
        ImportFileError: it is none, a selection stands in it twice, or it does not fit the model.
    """
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ImportFileError(f"{path} is no file of at most {MAX_BYTES} bytes; route-trace takes FILE.csv")
    said = _preamble(path)
    frame = _lines(path)
    numbers = frame["layer"].unique().sort().to_list()
    top_k = int(said.get("n_expert_used", 0)) or frame["slot"].n_unique()
    axis = layer_axis(
        options=options, path=path, entries=len(numbers), numbers=numbers, top_k=top_k,
        num_experts=int(said.get("n_expert", 0)),
    )  # fmt: skip
    weights = "weight" in frame.columns and bool(frame["weight"].is_finite().all())
    omissions = {"text": "the file has no token ids"}
    if not weights:
        omissions["weights"] = "the engine's graph did not show its gate weights"
    return Recording(
        layers=axis.layers,
        blocks=_blocks(path, frame, axis, top_k, weights=weights),
        model=Path(said.get("model", "")).stem,
        total_tokens=frame.select("turn", "step").n_unique(),
        omissions=omissions,
        notes=[_last_layer(frame)],
        settings={"engine": "BigMoeOnEdge", "architecture": said.get("arch", "")},
    )


def _preamble(path: Path) -> dict[str, str]:
    """What the lines with # say: model, arch, n_expert, n_expert_used."""
    with path.open("rb") as stream:
        head = stream.read(1 << 14).decode("utf-8", "replace")
    if not head.startswith("# route_trace v1"):
        raise ImportFileError(f"{path} does not begin with '# route_trace v1': no route trace of this engine")
    words = re.search(r"^# model=(?P<model>.*) arch=(?P<arch>\S*) (?P<rest>.*)$", head, re.MULTILINE)
    if words is None:
        return {}
    return {"model": words["model"], "arch": words["arch"], **dict(re.findall(r"(\w+)=(\d{1,9})\b", words["rest"]))}


def _lines(path: Path) -> pl.DataFrame:
    """The selections: turn, phase, step, layer, slot, expert (-1 = left out) and, where it is there, weight."""
    kinds = {name: pl.Float64 if name == "weight" else pl.Int64 for name in (*COLUMNS, "weight", "dropped")}
    frame = pl.read_csv(path, comment_prefix="#", schema_overrides=kinds)
    missing = sorted(set(COLUMNS) - set(frame.columns))
    if missing or frame.is_empty():
        raise ImportFileError(f"{path} has no {', '.join(missing) or 'selection'}: no route trace of this engine")
    if frame.select(COLUMNS).null_count().sum_horizontal().item():
        raise ImportFileError(f"{path}: a line has an empty field")
    if int(frame.select(pl.min_horizontal(pl.col(COLUMNS).min())).item()) < 0:
        raise ImportFileError(f"{path}: a step, layer, slot or expert is below 0")
    if frame.select("turn", "step", "layer", "slot").is_duplicated().any():
        raise ImportFileError(f"{path}: a selection (turn, step, layer, slot) stands in it twice")
    left_out = pl.col("dropped") > 0 if "dropped" in frame.columns else pl.lit(False)
    return frame.with_columns(pl.when(left_out).then(-1).otherwise(pl.col("expert")).alias("expert"))


def _blocks(path: Path, frame: pl.DataFrame, axis: Axis, top_k: int, *, weights: bool) -> Iterator[TraceBlock]:
    """Turn by turn, at most ``BLOCK_TOKENS`` tokens at once."""
    numbers = np.array([layer.layer for layer in axis.layers])
    for sequence, part in enumerate(frame.sort("turn").partition_by("turn", maintain_order=True)):
        steps, token = np.unique(part["step"].to_numpy(), return_inverse=True)
        place = (np.searchsorted(numbers, part["layer"].to_numpy()), token, part["slot"].to_numpy())
        if (slot := int(place[2].max())) >= top_k:
            raise ImportFileError(f"{path}: slot {slot} of a token that takes {top_k} experts")
        ids = np.full((len(numbers), len(steps), top_k), -1, np.int64)
        ids[place] = part["expert"].to_numpy()
        gates = np.zeros(ids.shape) if weights else None
        if gates is not None:
            gates[place] = part["weight"].to_numpy()
            gates[ids < 0] = 0.0
        generated = np.zeros(len(steps), bool)
        generated[token] = part["phase"].to_numpy() > 0
        for low in range(0, len(steps), BLOCK_TOKENS):
            some = slice(low, low + BLOCK_TOKENS)
            position = np.arange(len(steps))[some]
            yield TraceBlock(
                ids=ids[:, some], weights=None if gates is None else gates[:, some],
                sequence=np.full(len(position), sequence), position=position, generated=generated[some],
            )  # fmt: skip


def _last_layer(frame: pl.DataFrame) -> tuple[str, str, str]:
    """Whether all layers saw all tokens: a row of table ``check``."""
    tokens = (
        frame.group_by("layer").agg(pl.struct("turn", "step").n_unique().alias("tokens"))["tokens"].sort().to_list()
    )
    if tokens[0] == tokens[-1]:
        return "layers complete", "pass", "all layers saw the same tokens"
    seen = f"{tokens[0]} to {tokens[-1]} tokens"
    return "layers complete", "warning", f"layers saw {seen}: not every layer routes the whole prompt"


FORMATS = (
    Format("route-trace", "BigMoeOnEdge", "FILE.csv of --route-trace", "trace, weights", read, section=__doc__),
)  # fmt: skip
