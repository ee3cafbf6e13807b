"""Megatron Core's router trace (``--moe-routing-trace-path``): ``router_trace_rank*.jsonl``, a line per step and layer.

Source: megatron/core/transformer/moe/router_trace.py. A line holds ``step``, ``block`` ("decoder" or "mtp"), ``layer``,
``num_tokens``, ``topk`` and ``top_indices`` (num_tokens x topk). The first version of the tracer wrote no ``block``.

Only counts per step are taken. The file does not say where sequences begin (tokens are flattened from (position,
batch), and sequence parallelism gives each rank a part), and the ids of a token stand in ascending order, because the
tracer reads them from a mask. Layers are numbered from 0 by the hooks of training and inference, from 1 where inference
records with routing replay (``record_indices`` gets Megatron's layer_number).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.format import Format
from profiler.importers.model_config import model_shape
from profiler.importers.recording import CountBlock, ImportOptions, Recording
from profiler.importers.shape import Axis, layer_axis

MAX_LINE = 1 << 28
"""Bytes of a line: 1 M tokens with 22 experts each take 110 MiB."""

MAX_STEPS = 1 << 20

_REASON = "the file lists selections per step and layer, but not which tokens make a sequence"
OMISSIONS = {
    "trace": _REASON,
    "order": _REASON,
    "text": "the file has no token ids",
    "weights": "the file has no gate weights, and lists the experts of a token by number",
}


def read(path: Path, options: ImportOptions) -> Recording:
    """Open the trace of one rank.

    Raises:
        ImportFileError: a folder with the traces of several ranks, another layout, or another model's.
    """
    file = _one_file(path)
    source = _Source(file, options)
    first = next(source.steps(), None)
    if first is None:
        raise ImportFileError(f"{file} holds no line of a decoder layer")
    numbers = sorted(first.layers)
    source.first_layer = _first_layer(numbers, options)
    numbers = [number - source.first_layer for number in numbers]
    source.axis = layer_axis(options=options, path=file, entries=len(numbers), top_k=first.top_k, numbers=numbers)
    recording = Recording(
        layers=source.axis.layers, blocks=iter(()), omissions=dict(OMISSIONS),
        settings={"engine": "Megatron Core", "file": file.name, "first_layer": source.first_layer},
    )  # fmt: skip
    recording.blocks = source.blocks(recording.notes)
    return recording


def _first_layer(numbers: list[int], options: ImportOptions) -> int:
    """The number of the first decoder layer: 1 only if the configuration's MoE layers are these when counted from 1."""
    layers = list(model_shape(options.config).layers) if options.config else []
    return 1 if layers and numbers != layers and [number - 1 for number in numbers] == layers else 0


@dataclass
class _Step:
    """The lines of one step: layer -> ids (tokens, k) of each line."""

    number: int
    top_k: int = 0
    layers: dict[int, list[NDArray[np.int64]]] = field(default_factory=dict)


@dataclass
class _Source:
    """One file, read line by line."""

    path: Path
    options: ImportOptions
    axis: Axis | None = None
    first_layer: int = 0
    left_out: int = 0

    def steps(self) -> Iterator[_Step]:
        """The steps in the order of the file; lines of one step stand together."""
        step: _Step | None = None
        self.left_out = 0
        for record in self._records():
            if record.get("block", "decoder") != "decoder":
                self.left_out += 1
                continue
            number, layer = (self._integer(record, name) for name in ("step", "layer"))
            if step is None or number != step.number:
                if step is not None:
                    yield step
                    if number < step.number or number >= MAX_STEPS:
                        raise ImportFileError(f"{self.path}: step {number} stands after step {step.number}")
                step = _Step(number)
            ids = self._ids(record)
            if step.top_k and ids.shape[1] != step.top_k:
                raise ImportFileError(f"{self.path}: step {number} takes {ids.shape[1]} experts, then {step.top_k}")
            step.top_k = ids.shape[1]
            step.layers.setdefault(layer, []).append(ids)
        if step is not None:
            yield step

    def blocks(self, notes: list[tuple[str, str, str]]) -> Iterator[CountBlock]:
        """A block of counts per step; what is missing in a step is noted at the end."""
        assert self.axis is not None
        names = [layer.layer + self.first_layer for layer in self.axis.layers]
        experts, incomplete = self.axis.layers[0].num_experts, 0
        for step in self.steps():
            if strange := sorted(set(step.layers) - set(names)):
                raise ImportFileError(
                    f"{self.path}: step {step.number} has layer {strange[0]}, the first step had none"
                )
            self._require_once(step)
            counts = np.stack([self._counts(step.layers.get(name, []), experts) for name in names])
            incomplete += len({sum(map(len, step.layers.get(name, []))) for name in names}) > 1
            yield CountBlock(counts[None], np.array([step.number], np.int64), self.options.domain)
        if incomplete:
            detail = f"in {incomplete} steps the layers saw different numbers of tokens: some lines were not written"
            notes.append(("layers complete", "warning", detail))
        else:
            notes.append(("layers complete", "pass", "in every step all layers saw the same number of tokens"))
        if self.left_out:
            notes.append(
                ("layers left out", "warning", f"{self.left_out} lines of multi-token prediction were left out")
            )

    def _records(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as stream:
            for number in range(1, 1 << 62):
                line = stream.readline(MAX_LINE)
                if not line:
                    return
                if not line.endswith(b"\n") and len(line) == MAX_LINE:
                    raise ImportFileError(f"{self.path}: line {number} is longer than {MAX_LINE} bytes")
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ImportFileError(f"{self.path}: line {number} is no JSON: {str(error)[:100]}") from error
                if not isinstance(record, dict) or "top_indices" not in record:
                    raise ImportFileError(f"{self.path}: line {number} has no top_indices: no router trace of Megatron")
                yield record

    def _integer(self, record: dict[str, Any], name: str) -> int:
        value = record.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
            raise ImportFileError(f"{self.path}: {name} is {str(value)[:40]!r}; it is a number from 0")
        return value

    def _ids(self, record: dict[str, Any]) -> NDArray[np.int64]:
        try:
            ids = np.asarray(record["top_indices"])
        except ValueError as error:
            raise ImportFileError(f"{self.path}: tokens of top_indices have different numbers of experts") from error
        given = (record.get("num_tokens"), record.get("topk"))
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.shape != given:
            raise ImportFileError(
                f"{self.path}: top_indices are {ids.dtype} {ids.shape}, num_tokens and topk {given}; they are integers"
            )
        ordered = np.sort(ids, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ImportFileError(f"{self.path}: step {record.get('step')}: a token has an expert twice")
        return ids.astype(np.int64)

    def _counts(self, parts: list[NDArray[np.int64]], experts: int) -> NDArray[np.int64]:
        ids = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, np.int64)
        wrong = ids[(ids < 0) | (ids >= experts)]
        if len(wrong):
            raise ImportFileError(
                f"{self.path}: expert {wrong[0]} is out of range; {experts} experts are numbered 0 to {experts - 1}"
            )
        return np.bincount(ids, minlength=experts)

    def _require_once(self, step: _Step) -> None:
        """Refuse a step that was recorded twice: recomputation of activations calls the routers again."""
        for layer, parts in step.layers.items():
            for index, part in enumerate(parts):
                if len(part) >= 16 and any(np.array_equal(part, other) for other in parts[:index]):
                    raise ImportFileError(
                        f"{self.path}: step {step.number} holds the same selections of layer {layer} twice: record"
                        " without recomputation of activations"
                    )


def _one_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("router_trace_rank*.jsonl"))
    if len(found) != 1:
        raise ImportFileError(
            f"{path} has {len(found)} files router_trace_rank*.jsonl: name one. Ranks may hold the same tokens, other"
            " tokens, or other layers, and the files do not say which"
        )
    return found[0]


FORMATS = (Format("megatron", "Megatron Core", "router_trace_rank0.jsonl", "counts per step", read),)
