"""A result looked at again: from its files alone, or against what it was to become."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compressor.checkpoint.companions import PLAN
from compressor.checkpoint.files import Checkpoint, reading
from compressor.checkpoint.headers import read_header
from compressor.checkpoint.layers import StoredLayer, check_layer, read_decoder
from compressor.checkpoint.outputs import Copied, OutputFile
from compressor.families import EXPERT_MAP
from compressor.families.config_fields import TextConfig, find_text_config
from compressor.packed.view import dense_view
from compressor.plan import Plan, experts_after, kept_layers
from moescope.errors import ModelError, RunError

_SPOT = 4096
_SPOTS = 16


@dataclass(frozen=True)
class Verified:
    """What was found in a checkpoint that is in order.

    Attributes:
        files: safetensors files.
        tensors: tensors in them.
        bytes: size of the files.
        experts: decoder layer -> routed experts that it stores.
    """

    files: int
    tensors: int
    bytes: int
    experts: dict[int, int]


def verify(folder: str | Path) -> Verified:
    """Look a result of :func:`compressor.apply` over: headers, index, configuration, and its plan if it carries one.

    Every MoE layer has to hold its experts without a gap, a router row and bias for each (or for each that the map of
    form ``shared`` names), and as many as the configuration and the plan say. Packed matrices count as what they stand
    for, and have to be whole: codes, scales, zero points and shape.

    Raises:
        ModelError: something does not fit; the message names it.
    """
    files = Checkpoint.open(folder)
    checkpoint = dense_view(files)
    text = find_text_config(checkpoint.config)
    decoder = read_decoder(checkpoint, model_type=text.model_type, num_layers=text.layers)
    planned = _planned(checkpoint.folder)
    entries, maps = checkpoint.entries, text.content.get(EXPERT_MAP) or {}
    experts = {}
    for number, layer in decoder.layers.items():
        count = experts[number] = _count(layer, text)
        declared = text.number(text.count, number)
        places = maps.get(str(number))
        stored = declared if places is None else len(set(places))
        if stored is not None and stored != count:
            raise ModelError(f"layer {number} holds {count} experts and the configuration speaks of {stored}")
        if places is not None and (set(places) != set(range(count)) or len(places) != declared):
            raise ModelError(f"layer {number} has {declared} rows in its router, which {EXPERT_MAP} does not map")
        if planned is not None and planned.get(number, count) != count:
            raise ModelError(f"layer {number} holds {count} experts and its plan leaves {planned[number]}")
        names = (name for name in decoder.names.values() if name.stack == decoder.stack)
        check_layer(layer, names, entries, num_experts=count, extra_rows=text.extra_rows, routed=declared)
    if planned is not None and set(planned) != set(experts):
        raise ModelError(f"{folder} has experts in layers {sorted(experts)} and its plan leaves {sorted(planned)}")
    return Verified(len(files.shards), len(files.entries), files.bytes_on_disk, experts)


def _count(layer: StoredLayer, text: TextConfig) -> int:
    return layer.num_experts(text.number(text.width, layer.layer))


def _planned(folder: Path) -> dict[int, int] | None:
    """New number of a layer -> experts that the plan in the folder leaves, fillers included; None without plan."""
    if not (folder / PLAN).is_file():
        return None
    plan = Plan.load(folder / PLAN)
    places = {old: new for new, old in enumerate(kept_layers(plan))}
    counts = {places[layer]: len(experts) for (layer, _), experts in experts_after(plan).items()}
    if any(getattr(step, "form", "") == "padded" for step in plan.steps):
        return dict.fromkeys(counts, max(counts.values(), default=0))
    return counts


def compare(folder: Path, files: Iterable[OutputFile]) -> None:
    """Hold what was written against what was to be written: every tensor, nothing else, and bytes of some copies.

    Files that are wrong are removed, so that the next try writes them again.

    Raises:
        RunError: with the tensor.
    """
    expected = {file.name: file for file in files}
    found = {path.name for path in folder.iterdir() if path.suffix == ".safetensors"}
    if found != set(expected):
        raise RunError(f"{folder} holds {sorted(found ^ set(expected))[0]}, or lacks it: apply the plan again")
    wrong: list[str] = []
    for name, file in expected.items():
        try:
            _compare_header(folder / name, file)
            _compare_spots(folder / name, file)
        except (ModelError, RunError) as error:
            wrong.append(str(error))
            (folder / name).unlink()
    if wrong:
        raise RunError(wrong[0])


def _compare_header(path: Path, file: OutputFile) -> None:
    entries, _ = read_header(path)
    wanted = [(output.name, output.dtype, output.shape) for output in file.tensors if output.size]
    if [(entry.name, entry.dtype, entry.shape) for entry in entries if entry.size] != wanted:
        raise RunError(f"{path} does not hold the tensors that it should: apply the plan again")


def _compare_spots(path: Path, file: OutputFile) -> None:
    """First and last bytes of copies spread over the file."""
    copies, place = [], len(file.header)
    for output in file.tensors:
        for piece in output.pieces:
            if isinstance(piece, Copied):
                copies.append((output.name, place, piece))
            place += piece.size
    with reading() as reader:
        for name, begin, piece in copies[:: max(len(copies) // _SPOTS, 1)]:
            size = min(_SPOT, piece.size)
            for offset in (0, piece.size - size):
                old = reader.bytes(piece.entry.file, piece.start + offset, size)
                if old != reader.bytes(path, begin + offset, size):
                    raise RunError(f"{name} in {path} is not what the source holds: apply the plan again")


def index_text(files: Iterable[OutputFile]) -> str:
    """The index of the result."""
    tensors = [(output, file.name) for file in files for output in file.tensors]
    content = {
        "metadata": {"total_size": sum(output.size for output, _ in tensors)},
        "weight_map": {output.name: name for output, name in sorted(tensors, key=lambda item: item[0].name)},
    }
    return json.dumps(content, indent=2) + "\n"
