"""llama.cpp's importance matrix: how often each expert was used while it was made.

``llama-imatrix`` writes, for every weight, ``NAME.counts`` (1, experts): the tokens that went through each expert's
matrix. The three projections of a layer count the same selections, so one of them is read. Counts are 32-bit floats:
exact up to 16,777,216.

Source: tools/imatrix/imatrix.cpp of llama.cpp (collect_imatrix, save_imatrix).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ImportFileError
from profiler.importers import gguf
from profiler.importers.format import Format
from profiler.importers.recording import CountBlock, ImportOptions, Recording
from profiler.importers.shape import layer_axis

PROJECTIONS = ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps")
"""Names of the experts' matrices; the first that a layer has is read, the others are compared with it."""

_NAME = re.compile(r"^blk\.(\d{1,4})\.(\w+)\.weight\.counts$")
_OMISSIONS = {
    "trace": "an importance matrix counts uses per expert, not which token used which expert",
    "order": "an importance matrix keeps no order",
    "weights": "an importance matrix holds no gate weights",
    "text": "an importance matrix holds no tokens",
}


def read(path: Path, options: ImportOptions) -> Recording:
    """Open an importance matrix in GGUF.

    Raises:
        ImportFileError: it is no such file, or of a model without experts.
    """
    file = gguf.read(path)
    if file.values.get("general.type") != "imatrix":
        raise ImportFileError(f"{path} is a GGUF file of type {file.values.get('general.type')!r}, not 'imatrix'")
    found = _counts(file)
    if not found:
        raise ImportFileError(f"{path} has no counts of experts (blk.N.ffn_*_exps): is it of a MoE model?")
    layers = sorted(found)
    chosen = {layer: next(found[layer][name] for name in PROJECTIONS if name in found[layer]) for layer in layers}
    widths = {len(counts) for counts in chosen.values()}
    if len(widths) > 1:
        raise ImportFileError(f"{path}: layers have {min(widths)} to {max(widths)} experts; one number for all is read")
    axis = layer_axis(
        options=options, path=path, entries=len(layers), num_experts=widths.pop(), numbers=layers
    )  # fmt: skip
    counts = np.stack([chosen[layer.layer] for layer in axis.layers])[None]
    keys = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    return Recording(
        layers=axis.layers, blocks=iter([CountBlock(counts, np.zeros(1, np.int64), options.domain)]),
        omissions=dict(_OMISSIONS), notes=[_agreement(found, chosen)],
        settings={"engine": "llama.cpp", **{key: file.values[key] for key in keys if key in file.values}},
    )  # fmt: skip


def _counts(file: gguf.File) -> dict[int, dict[str, NDArray[np.int64]]]:
    """Counts by layer and projection."""
    found: dict[int, dict[str, NDArray[np.int64]]] = {}
    for name in file.tensors:
        match = _NAME.match(name)
        if match is None or match[2] not in PROJECTIONS:
            continue
        values = file.array(name).reshape(-1)
        if not np.isfinite(values).all() or (values < 0).any() or (values != np.rint(values)).any():
            raise ImportFileError(f"{file.path}: {name} holds no counts, but {values.min()} to {values.max()}")
        if (values > 2**53).any():
            raise ImportFileError(f"{file.path}: {name} counts up to {values.max():.3g}, which cannot be")
        if len(values) == 1:
            raise ImportFileError(
                f"{file.path}: {name} holds one count for all experts: it was made from a .dat file, which has no more"
            )
        found.setdefault(int(match[1]), {})[match[2]] = values.astype(np.int64)
    return found


def _agreement(
    found: dict[int, dict[str, NDArray[np.int64]]], chosen: dict[int, NDArray[np.int64]]
) -> tuple[str, str, str]:
    """Whether the projections of each layer counted the same."""
    differ = [
        layer for layer, parts in found.items() if any(not np.array_equal(one, chosen[layer]) for one in parts.values())
    ]
    if differ:
        names = ", ".join(map(str, differ[:5]))
        return ("projections agree", "warning", f"the projections of layers {names} counted different numbers of uses")
    return ("projections agree", "pass", "all projections of each layer counted the same uses")


FORMATS = (Format("imatrix", "llama.cpp", "FILE.gguf of llama-imatrix", "counts", read),)
