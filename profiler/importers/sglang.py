"""SGLang: the expert distribution recorder in its three modes, and the ``routed_experts`` that responses return.

The recorder (``--expert-distribution-recorder-mode``) writes .pt files, which take torch to read, with weights only.
Counts of mode ``stat`` are of logical experts; ``per_pass`` and ``per_token`` count physical replicas, mapped by the
file's own ``last_physical_to_logical_map``. Without an all-to-all backend every rank counts all tokens it was given,
and ranks that share their tokens count the same ones.

Source: python/sglang/srt/eplb/expert_distribution.py, eplb/eplb_simulator/reader.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers import torch_file
from profiler.importers.format import Format
from profiler.importers.recording import CountBlock, ImportOptions, Recording, TraceBlock
from profiler.importers.replicas import ReplicaMap
from profiler.importers.requests import Requests
from profiler.importers.shape import Axis, layer_axis, require_dense_empty

SLOTS = 8
"""Experts per token that mode ``per_token`` has room for."""

SPECULATIVE = (5, 6)
"""Values of ``forward_mode`` that verify or make drafts (TARGET_VERIFY, DRAFT_EXTEND)."""

_COUNTS = {
    "trace": "the recorder counted per forward pass, not which token used which expert",
    "order": "counts per forward pass keep no order of tokens",
    "weights": "the recorder keeps no gate weights",
    "text": "the recorder keeps no tokens in this mode",
}


def read_stat(path: Path, options: ImportOptions) -> Recording:
    """Mode ``stat`` or ``stat_approx``: ``logical_count`` (steps, layers, experts) in one .pt file.

    Raises:
        ImportFileError: it is no such file, or does not fit the model.
    """
    content = _dictionary(path, "logical_count")
    counts = torch_file.array(content["logical_count"], "logical_count", path, axes=3)
    axis = layer_axis(options=options, path=path, entries=counts.shape[1], num_experts=counts.shape[2])
    used = np.flatnonzero(counts.any(axis=(1, 2)))  # the ring of steps is longer than what was recorded
    if not len(used):
        raise ImportFileError(f"{path} counts nothing: the recorder was not started, or nothing was served")
    steps = counts[_in_time(used, len(counts))]
    _require_dense_unused(steps.transpose(1, 0, 2), axis, path)
    notes = []
    if len(used) == len(counts):
        notes.append(("ring of steps", "warning", f"all {len(counts)} steps are used: if the ring went round, they are"
                      " not in the order of time"))  # fmt: skip
    if (factor := int(np.gcd.reduce(steps.astype(np.int64), axis=None))) > 1:
        notes.append(("ranks added", "warning", f"every count is a multiple of {factor}: if {factor} ranks saw the same"
                      " tokens, SGLang added them up; shares hold, but there were fewer tokens"))  # fmt: skip
    block = CountBlock(steps[:, axis.kept], np.arange(len(steps)), options.domain)
    return Recording(
        layers=axis.layers, blocks=iter([block]), omissions=dict(_COUNTS), notes=notes,
        settings={"mode": "stat", "steps": len(steps)},
    )  # fmt: skip


def _in_time(used: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Used rows of the ring in the order of time.

    A dump empties the ring, but the next recording goes on where the last one ended: it begins behind the longest
    stretch of empty rows.
    """
    if len(used) == length:
        return used
    gaps = np.diff(used, append=used[0] + length)
    return np.roll(used, -int(gaps.argmax()) - 1)


def read_per_pass(path: Path, options: ImportOptions) -> Recording:
    """Mode ``per_pass``: a .pt file per rank, or a folder of them; ranks are added up per forward pass.

    Ranks whose counts are equal in every forward pass saw the same tokens: one of them is taken.

    Raises:
        ImportFileError: a file is none of these, or they do not fit each other or the model.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise ImportFileError(f"{path} holds no .pt file")
    passes: dict[int, NDArray[np.int64]] = {}
    first: dict[int, NDArray[np.int64]] = {}
    ranks: dict[int, set[int]] = {}
    same = True
    for file in files:
        content = _dictionary(file, "records")
        replicas = _map(content, options, file)
        for record in _records(content, file):
            counts = torch_file.array(record.get("global_physical_count"), "global_physical_count", file, axes=2)
            number, rank = record.get("forward_pass_id"), record.get("rank", 0)
            if not isinstance(number, int) or not isinstance(rank, int):
                raise ImportFileError(f"{file}: a record has no forward_pass_id, or no rank")
            logical = replicas.counts(counts, file)
            if number in passes and passes[number].shape != logical.shape:
                raise ImportFileError(f"{file}: forward pass {number} has another shape than in another file")
            if rank in ranks.setdefault(number, set()):
                raise ImportFileError(f"{file}: forward pass {number} of rank {rank} stands there twice")
            ranks[number].add(rank)
            same = same and np.array_equal(first.setdefault(number, logical), logical)
            passes[number] = passes.get(number, 0) + logical
    if not passes:
        raise ImportFileError(f"{path} holds no forward pass")
    notes = []
    if same and min(map(len, ranks.values())) > 1:
        passes = first
        notes.append(("ranks that agree", "warning", "the counts of all ranks are equal in every forward pass: they saw"
                      " the same tokens, and are taken once"))  # fmt: skip
    stacked = [passes[number] for number in sorted(passes)]
    if len({part.shape for part in stacked}) > 1:
        raise ImportFileError(f"{path}: its forward passes have counts of several shapes")
    counts = np.stack(stacked)
    axis = layer_axis(options=options, path=path, entries=counts.shape[1], num_experts=counts.shape[2])
    _require_dense_unused(counts.transpose(1, 0, 2), axis, path)
    block = CountBlock(counts[:, axis.kept], np.arange(len(counts)), options.domain)
    return Recording(
        layers=axis.layers, blocks=iter([block]), omissions=dict(_COUNTS), notes=notes,
        settings={"mode": "per_pass", "files": [file.name for file in files]},
    )  # fmt: skip


def read_per_token(path: Path, options: ImportOptions) -> Recording:
    """Mode ``per_token``: one rank's .pt file; sequences are put together from positions.

    The recorder keeps no request ids. A stretch of a prompt, or a decoded token, goes on a sequence if exactly one
    sequence ends where it begins; otherwise it begins a sequence of its own.

    Raises:
        ImportFileError: it is no such file, holds fused shared experts or speculative decoding, or does not fit the
            model.
    """
    content = _dictionary(path, "records")
    records = _records(content, path)
    replicas = _map(content, options, path)
    entries = len(replicas.experts)
    width = max((_width(record, entries, path) for record in records), default=0)
    axis = layer_axis(
        options=options, path=path, entries=entries, top_k=width, num_experts=replicas.num_experts
    )  # fmt: skip
    requests = Requests()
    return Recording(
        layers=axis.layers, blocks=_token_blocks(records, replicas, axis, width, requests, path),
        omissions={"weights": "the recorder keeps ids without gate weights, in the order of the engine",
                   "order": "requests are told apart by positions alone; what could not be told stands by itself"},
        settings={"mode": "per_token", "records": len(records)},
    )  # fmt: skip


def _token_blocks(
    records: list[dict[str, Any]], replicas: ReplicaMap, axis: Axis, width: int, requests: Requests, path: Path
) -> Iterator[TraceBlock]:
    for record in records:
        physical = torch_file.array(record.get("topk_ids_of_layer"), "topk_ids_of_layer", path, axes=3)[..., :width]
        tokens = physical.shape[1]
        mode = record.get("forward_mode")
        if isinstance(mode, int) and mode in SPECULATIVE:
            raise ImportFileError(
                f"{path} holds speculative decoding (forward_mode {mode}): drafts that were refused cannot be told"
                " from tokens"
            )
        token_ids, positions = (_numbers(record.get(name), name, path) for name in ("input_ids", "positions"))
        if len(token_ids) != tokens or len(positions) != tokens:
            raise ImportFileError(
                f"{path}: a record has {tokens} tokens of ids, but other numbers of positions or inputs"
            )
        if not tokens:
            continue
        ids = replicas.ids(physical, path)
        require_dense_empty(ids, axis, path)
        stretches = _stretches(record, positions, path)
        sequence, position, order = requests.place(positions, stretches)
        generated = np.repeat([high - low == 1 and positions[low] > 0 for low, high in stretches],
                              [high - low for low, high in stretches])  # fmt: skip
        yield TraceBlock(
            ids[axis.kept][:, order], None, sequence[order], position[order], generated[order], token_ids[order],
        )  # fmt: skip


def _stretches(record: dict[str, Any], positions: NDArray[np.int64], path: Path) -> list[tuple[int, int]]:
    """Parts of a record that belong to one request each: by ``extend_seq_lens``, or token by token when decoding."""
    lengths = record.get("extend_seq_lens")
    if lengths is None:
        return [(index, index + 1) for index in range(len(positions))]
    values = _numbers(lengths, "extend_seq_lens", path).tolist()
    if sum(values) != len(positions) or min(values, default=0) < 0:
        raise ImportFileError(f"{path}: extend_seq_lens do not add up to the {len(positions)} tokens of their record")
    edges = np.cumsum([0, *values]).tolist()
    parts = [(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True) if high > low]
    for low, high in parts:
        if (np.diff(positions[low:high]) != 1).any():
            raise ImportFileError(f"{path}: the positions of a prompt skip tokens")
    return parts


def _numbers(value: Any, name: str, path: Path) -> NDArray[np.int64]:
    """A list of whole numbers, as SGLang writes it, or a tensor of them."""
    if not isinstance(value, list):
        return torch_file.array(value, name, path, axes=1).astype(np.int64)
    if not all(type(one) is int and -(1 << 62) < one < 1 << 62 for one in value):
        raise ImportFileError(f"{path}: {name} is no list of whole numbers")
    return np.asarray(value, np.int64)


def _width(record: dict[str, Any], entries: int, path: Path) -> int:
    """Slots of a record that hold experts; the others are -1 throughout."""
    ids = torch_file.array(record.get("topk_ids_of_layer"), "topk_ids_of_layer", path, axes=3)
    if ids.shape[0] != entries or ids.shape[2] > SLOTS:
        raise ImportFileError(
            f"{path}: topk_ids_of_layer has shape {ids.shape}, not ({entries} layers, tokens, {SLOTS})"
        )
    used = np.flatnonzero((ids >= 0).any(axis=(0, 1)))
    return int(used.max(initial=-1)) + 1


def _dictionary(path: Path, key: str) -> dict[str, Any]:
    if not path.is_file():
        raise ImportFileError(f"{path} is no file; this mode takes the .pt file of the recorder")
    content = torch_file.load(path)
    if not isinstance(content, dict) or key not in content:
        names = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise ImportFileError(f"{path} has no {key!r} (it holds {names}): another mode of the recorder?")
    return content


def _records(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    records = content["records"]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ImportFileError(f"{path}: records is no list of dictionaries")
    return records


def _map(content: dict[str, Any], options: ImportOptions, path: Path) -> ReplicaMap:
    if "physical_to_logical" in options.extra:
        return ReplicaMap.read(options.extra["physical_to_logical"])
    values = content.get("last_physical_to_logical_map")
    if values is None:
        raise ImportFileError(f"{path} holds no last_physical_to_logical_map: give --physical-to-logical FILE")
    return ReplicaMap.of(torch_file.array(values, "last_physical_to_logical_map", path, axes=2), path)


def _require_dense_unused(counts: NDArray[Any], axis: Axis, path: Path) -> None:
    """Counts (entries, ...) of dense layers must be zero."""
    for entry in axis.dropped.tolist():
        if counts[entry].any():
            raise ImportFileError(
                f"{path}: layer {entry} is dense by --config, but counts selections: another model's?"
            )


FORMATS = (
    Format("sglang-stat", "SGLang", "RECORDER.pt", "counts per step", read_stat),
    Format("sglang-per-pass", "SGLang", "RECORDER.pt or a folder of ranks", "counts per forward pass", read_per_pass),
    Format("sglang-per-token", "SGLang", "RECORDER.pt of one rank", "trace, token ids", read_per_token),
)
