"""In what precision a checkpoint keeps its weights, in what precision the model holds them, and what that limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from moescope.errors import ModelError
from profiler.capture.check_rows import CheckRow
from profiler.capture.discovery import MoELayer

DEQUANTIZING = ("fp8", "mxfp8", "mxfp4", "compressed-tensors", "metal", "gguf")
"""Methods whose weights the library can unpack while it loads them."""

ROUNDING = ("fp8", "mxfp8", "fbgemm_fp8", "nvfp4")
"""Methods whose kernels always round activations."""


@dataclass(frozen=True)
class Precision:
    """How the weights of a quantized checkpoint are kept.

    Attributes:
        method: the method, as the checkpoint names it.
        stored: the same with its parameters, for people.
        rounds_activations: whether its kernels round what enters a product, too.
        dequantized: whether the model that was loaded holds plain weights instead.
    """

    method: str
    stored: str
    rounds_activations: bool = False
    dequantized: bool = False


_loaded: WeakKeyDictionary[nn.Module, Precision] = WeakKeyDictionary()


def stored_precision(config: Any) -> Precision | None:
    """The precision that a configuration declares; None where the checkpoint is not quantized."""
    declared = getattr(config, "quantization_config", None)
    if declared is None and hasattr(config, "get_text_config"):
        declared = getattr(config.get_text_config(), "quantization_config", None)
    if declared is None:
        return None
    entries = declared if isinstance(declared, Mapping) else declared.to_dict()
    method = entries.get("quant_method") or ("bitsandbytes" if _bits(entries) else "unknown")
    name = str(getattr(method, "value", method))
    rounds = name in ROUNDING or any(group.get("input_activations") for group in _groups(entries))
    return Precision(name, " ".join([name, *_parameters(name, entries)]), rounds)


def is_gguf(path_or_id: str | Path) -> bool:
    """Whether this is a GGUF file."""
    path = Path(path_or_id)
    return path.suffix == ".gguf" and path.is_file()


def gguf_precision(file: Path) -> Precision | None:
    """The types of the blocks in a GGUF file; None where it holds plain numbers only.

    Raises:
        ModelError: not a GGUF file, or with blocks of a type that the library does not know.
    """
    from transformers.integrations.gguf.dequant import GGML_BLOCK, GGML_NAME
    from transformers.integrations.gguf.reader import GgufHeader

    try:
        types = set(GgufHeader.from_file(str(file)).ggml_types.values())
    except Exception as error:  # whatever broken bytes lead to
        raise ModelError(f"{file} cannot be read as GGUF: {' '.join(str(error).split())[:200]}") from error
    names = sorted(GGML_NAME.get(number, str(number)) for number in types & set(GGML_BLOCK))
    return Precision("gguf", f"gguf {', '.join(names)}") if names else None


def remember(model: nn.Module, precision: Precision) -> None:
    """Keep what is known of a model that was just loaded; its configuration forgets it when it is dequantized."""
    _loaded[model] = precision


def precision_of(model: nn.Module) -> Precision | None:
    """How the weights of a model are kept, as far as its loading or its configuration says; None for plain weights."""
    return _loaded.get(model) or stored_precision(getattr(model, "config", None))


def precision_checks(model: nn.Module, layers: Sequence[MoELayer], levels: Sequence[str]) -> list[CheckRow]:
    """What table ``check`` says about quantized weights; nothing for plain ones."""
    precision = precision_of(model)
    if precision is None:
        return []
    packed = [layer for layer in layers if layer.layout is None]
    dtype = str(next(layers[0].experts.parameters()).dtype).removeprefix("torch.")
    name = "weights as stored"
    if precision.dequantized:
        detail = f"{precision.stored} weights were dequantized to {dtype}: figures are those of the dequantized model"
        if precision.rounds_activations:
            detail += ", which does not round activations as the packed kernels do"
        return [CheckRow(name, "warning", None, None, detail)]
    if packed:
        kind = type(packed[0].experts).__name__
        detail = f"experts of {len(packed)} layers ran packed ({precision.stored}, {kind})"
        if "activations" in levels:
            detail += "; outputs come from a second call for every (token, expert), and what only plain weights or the"
            detail += " inside of a kernel could show is left out: norms of weights, and neurons where they stay hidden"
        return [CheckRow(name, "pass", None, None, detail)]
    if precision.method in DEQUANTIZING:
        detail = f"{precision.stored} weights of the experts of {len(layers)} layers were dequantized to {dtype}"
        return [CheckRow(name, "warning", None, None, f"{detail}: figures are those of dequantized experts")]
    detail = (
        f"{precision.stored} covers linear layers only: the experts of {len(layers)} layers are plain {dtype}, so that"
        " neither their figures nor their memory are those of quantized experts"
    )
    return [CheckRow("experts quantized", "warning", None, None, detail)]


def require_one_scheme(folder: Path, used: int | None) -> None:
    """Refuse compressed-tensors checkpoints whose experts the library would unpack wrongly without a word.

    transformers (5.17 to 5.23) unpacks all experts of a model by one scheme, the first whose target speaks of experts.
    Experts packed with several widths come out as noise; with zero points it stops half-way.

    Args:
        folder: where the safetensors are.
        used: the width that the library will take, see :func:`experts_width`.

    Raises:
        ModelError: such a checkpoint; the message names two tensors.
    """
    from safetensors import safe_open

    widths: dict[int, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            for name in sorted(names):
                match = re.search(r"\.experts\.\d+\..*\.weight_packed$", name)
                shape = name.removesuffix("_packed") + "_shape"
                if match is None or shape not in names:
                    continue
                if name.removesuffix("_packed") + "_zero_point" in names:
                    raise ModelError(f"{name} has zero points, which transformers cannot unpack in experts: {_CURE}")
                columns = tensors.get_slice(name).get_shape()[1]
                widths.setdefault(32 * columns // int(tensors.get_tensor(shape)[1]), name)
    if len(widths) > 1 or (widths and used is not None and used not in widths):
        kept = ", ".join(f"{bits} bit ({name})" for bits, name in sorted(widths.items())[:2])
        raise ModelError(f"its experts are packed with {kept}, but transformers unpacks all with {used} bit: {_CURE}")


_CURE = "profile the model that it was made from"


def experts_width(config: Any) -> int | None:
    """The width by which the library will unpack experts; None where it does not say."""
    try:
        from transformers.integrations.compressed_tensors import get_experts_scheme
    except ImportError:
        return None
    declared = config.quantization_config
    entries = declared if isinstance(declared, Mapping) else declared.to_dict()
    groups = entries.get("config_groups") or {}
    if not groups:
        return None
    named = SimpleNamespace(config_groups={name: SimpleNamespace(**group) for name, group in groups.items()})
    weights = get_experts_scheme(named).weights or {}
    return int(weights["num_bits"]) if "num_bits" in weights else None


def _parameters(method: str, entries: Mapping[str, Any]) -> list[str]:
    words = [f"{bits} bit"] if (bits := _bits(entries)) else []
    if entries.get("weight_block_size"):
        words.append("blocks " + "x".join(map(str, entries["weight_block_size"])))
    widths = sorted({int((group.get("weights") or {}).get("num_bits") or 0) for group in _groups(entries)} - {0})
    if method == "compressed-tensors" and widths:
        words += [str(entries.get("format", "")), f"{'/'.join(map(str, widths))} bit"]
    return [word for word in words if word]


def _groups(entries: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemes of compressed-tensors; none elsewhere."""
    groups = entries.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _bits(entries: Mapping[str, Any]) -> int:
    if entries.get("load_in_4bit") or entries.get("_load_in_4bit"):
        return 4
    if entries.get("load_in_8bit") or entries.get("_load_in_8bit"):
        return 8
    bits = entries.get("bits") or entries.get("w_bit") or entries.get("nbits")
    return int(bits) if isinstance(bits, int) else 0
