"""TensorRT-LLM's expert statistics: a folder with ``meta_info.json`` and a .safetensors file per rank.

Keys are ``ITERATION_LAYER``; values are counts (experts,), added up over ranks, or, in ``rank*_raw.safetensors`` of
derived versions, the selected ids (tokens, k) of that iteration. The raw files do not say which tokens make a sequence,
so they are counted. With a load balancer the engine counts slots, and ``num_experts`` is their number.

Source: tensorrt_llm/_torch/expert_statistic.py, examples/wide_ep/ep_load_balancer/utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers.format import Format
from profiler.importers.recording import CountBlock, ImportOptions, Recording
from profiler.importers.replicas import ReplicaMap
from profiler.importers.shape import layer_axis

MAX_META = 1 << 20
SPANS_AT_ONCE = 1024
_KEY = re.compile(r"^(\d{1,9})_(\d{1,4})$")
_OMISSIONS = {
    "trace": "the statistics count per iteration, not which token used which expert",
    "order": "counts per iteration keep no order of tokens",
    "weights": "the statistics hold no gate weights",
    "text": "the statistics hold no tokens",
}


def read(path: Path, options: ImportOptions) -> Recording:
    """Open the folder of EXPERT_STATISTIC_PATH.

    Raises:
        ImportFileError: it holds no statistics, or they do not fit the model.
    """
    if not path.is_dir():
        raise ImportFileError(f"{path} is no folder; tensorrt-llm takes the folder of EXPERT_STATISTIC_PATH")
    meta = _meta(path / "meta_info.json")
    counted = sorted(file for file in path.glob("rank*.safetensors") if not file.stem.endswith("_raw"))
    files = counted or sorted(path.glob("rank*_raw.safetensors"))
    if not files:
        raise ImportFileError(f"{path} holds no rank*.safetensors")
    places, notes = _places(files), []
    if _agree(places, files):
        places = {place: holders[:1] for place, holders in places.items()}
        notes.append(("ranks that agree", "warning", f"all {len(files)} ranks counted the same everywhere: they saw the"
                      " same tokens, and are taken once"))  # fmt: skip
    layers, slots = sorted({layer for _, layer in places}), _integer(meta, "num_experts")
    replicas = _replicas(options, len(layers), slots, path)
    axis = layer_axis(
        options=options, path=path, entries=len(layers), num_experts=replicas.num_experts if replicas else slots,
        top_k=_integer(meta, "num_experts_per_token"), numbers=layers,
    )  # fmt: skip
    return Recording(
        layers=axis.layers,
        blocks=_blocks(places, layers, slots or axis.layers[0].num_experts, replicas, path, options),
        omissions=dict(_OMISSIONS), notes=notes,
        settings={"engine": "TensorRT-LLM", "files": [file.name for file in files]},
    )  # fmt: skip


def _replicas(options: ImportOptions, layers: int, slots: int, path: Path) -> ReplicaMap | None:
    """The user's map of slots, if there is one."""
    if "physical_to_logical" not in options.extra:
        return None
    replicas = ReplicaMap.read(options.extra["physical_to_logical"])
    if replicas.experts.shape != (layers, slots):
        raise ImportFileError(
            f"{path} counts {slots} slots in {layers} layers; --physical-to-logical maps {replicas.experts.shape}"
        )
    return replicas


def _agree(places: dict[tuple[int, int], list[Path]], files: list[Path]) -> bool:
    """Whether there are several ranks, and every tensor is the same in all of them: the ranks share their tokens."""
    if len(files) == 1 or any(len(holders) != len(files) for holders in places.values()):
        return False
    opened = [_open(file) for file in files]
    for iteration, layer in places:
        first, *others = (_tensor(one, f"{iteration}_{layer}", file) for one, file in zip(opened, files, strict=True))
        if not all(np.array_equal(first, other) for other in others):
            return False
    return True


def _places(files: list[Path]) -> dict[tuple[int, int], list[Path]]:
    """(iteration, layer) -> the files that hold it."""
    places: dict[tuple[int, int], list[Path]] = {}
    for file in files:
        for key in _open(file).keys():  # noqa: SIM118  a file of tensors is no dictionary
            match = _KEY.match(key)
            if match is None:
                raise ImportFileError(f"{file}: tensor {key[:40]!r} is not named ITERATION_LAYER")
            places.setdefault((int(match[1]), int(match[2])), []).append(file)
    if not places:
        raise ImportFileError(f"{files[0]} holds no tensor")
    return places


def _blocks(
    places: dict[tuple[int, int], list[Path]],
    layers: list[int],
    slots: int,
    replicas: ReplicaMap | None,
    path: Path,
    options: ImportOptions,
) -> Iterator[CountBlock]:
    iterations = sorted({iteration for iteration, _ in places})
    opened = {file: _open(file) for files in places.values() for file in files}
    for start in range(0, len(iterations), SPANS_AT_ONCE):
        part = iterations[start : start + SPANS_AT_ONCE]
        counts = np.zeros((len(part), len(layers), slots), np.int64)
        for span, iteration in enumerate(part):
            for row, layer in enumerate(layers):
                for file in places.get((iteration, layer), ()):
                    counts[span, row] += _counts(opened[file], f"{iteration}_{layer}", slots, file)
        if replicas is not None:
            counts = np.stack([replicas.counts(one, path) for one in counts])
        yield CountBlock(counts, start + np.arange(len(part)), options.domain)


def _counts(opened: Any, key: str, experts: int, file: Path) -> NDArray[np.int64]:
    values = _tensor(opened, key, file)
    if values.ndim == 1:
        if len(values) != experts or (values.size and int(values.min()) < 0):
            raise ImportFileError(f"{file}: tensor {key} has {len(values)} counts; the model has {experts} experts")
        return values.astype(np.int64)
    if values.ndim != 2 or (values.size and not 0 <= int(values.min()) <= int(values.max()) < experts):
        raise ImportFileError(f"{file}: tensor {key} {values.shape} holds no ids (tokens, k) of {experts} experts")
    return np.bincount(values.ravel(), minlength=experts).astype(np.int64)


def _tensor(opened: Any, key: str, file: Path) -> NDArray[Any]:
    try:
        values = np.asarray(opened.get_tensor(key))
    except (TypeError, ValueError, AttributeError) as error:  # a type that NumPy does not know
        raise ImportFileError(f"{file}: tensor {key} is not of integers: {str(error)[:80]}") from error
    if values.dtype.kind not in "iu":
        raise ImportFileError(f"{file}: tensor {key} is {values.dtype}, not integers")
    return values


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError, ValueError) as error:
        raise ImportFileError(f"{file} is no .safetensors file: {str(error).splitlines()[0][:120]}") from error


def _meta(file: Path) -> dict[str, Any]:
    if not file.is_file() or file.stat().st_size > MAX_META:
        raise ImportFileError(f"{file.parent} holds no {file.name}, or one that is too large")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ImportFileError(f"{file} is no JSON: {str(error).splitlines()[0][:120]}") from error
    if not isinstance(content, dict):
        raise ImportFileError(f"{file} holds no JSON object")
    return content


def _integer(meta: dict[str, Any], name: str) -> int:
    value = meta.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ImportFileError(f"meta_info.json: {name} is {value!r}, not a number of experts")
    return value


FORMATS = (Format("tensorrt-llm", "TensorRT-LLM", "folder of statistics", "counts per iteration", read),)
