"""Files of engines, built from their documented layouts byte by byte; every function returns the path it wrote."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIG = {
    "model_type": "toy", "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
"""Three decoder layers, the first of them dense; four experts, two per token."""

REPLICAS = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2], [1, 0, 2, 3, 2, 1]])
"""(layers, replicas): which expert each of six replicas is."""


def gguf(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]], *, version: int = 3
) -> Path:
    """A GGUF file with texts and unsigned numbers as values, and tensors of 32-bit floats."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    for key, value in values.items():
        if isinstance(value, str):
            head += text(key) + struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            head += text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        else:
            head += text(key) + struct.pack("<II", 4, value)
    data = b""
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]  # the fastest axis first
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        head += struct.pack("<IQ", 0, len(data))
        data += tensor.astype("<f4").tobytes()
        data += bytes(-len(data) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def imatrix(path: Path, counts: Mapping[int, Sequence[float]], *, projections: Sequence[str] = ()) -> Path:
    """What llama-imatrix writes: sums and counts per weight."""
    names = projections or ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer, values in counts.items():
        for name in names:
            tensors[f"blk.{layer}.{name}.weight.in_sum2"] = np.ones((len(values), 8), np.float32)
            tensors[f"blk.{layer}.{name}.weight.counts"] = np.asarray(values, np.float32).reshape(-1, 1)
        tensors[f"blk.{layer}.attn_q.weight.counts"] = np.full((1, 1), 512, np.float32)
    facts = {"general.type": "imatrix", "imatrix.datasets": ["calibration.txt"], "imatrix.chunk_count": 7}
    return gguf(path, facts, tensors)


def safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> Path:
    """A .safetensors file: length of the header, header, data."""
    kinds = {"int32": "I32", "int64": "I64", "float32": "F32"}
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor).tobytes()
        header[name] = {"dtype": kinds[tensor.dtype.name], "shape": list(tensor.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensorrt_llm(folder: Path, ranks: Sequence[Mapping[str, NDArray[Any]]], *, raw: bool = False, **meta: Any) -> Path:
    """The folder of EXPERT_STATISTIC_PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": 4, "num_experts_per_token": 2, **meta}))
    for rank, tensors in enumerate(ranks):
        safetensors(folder / f"rank{rank}{'_raw' if raw else ''}.safetensors", tensors)
    return folder


def torch_file(path: Path, content: Any) -> Path:
    """What torch.save writes; arrays become tensors."""
    import torch

    def tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, dict):
            return {key: tensors(one) for key, one in value.items()}
        return [tensors(one) for one in value] if isinstance(value, list) else value

    torch.save(tensors(content), path)
    return path


def record(
    *, ids: NDArray[np.int32], input_ids: Sequence[int], positions: Sequence[int], lengths: Sequence[int] | None
) -> dict[str, Any]:
    """One record of SGLang's mode per_token; ids (layers, tokens, k) become eight slots wide, inputs are lists."""
    wide = np.full((*ids.shape[:2], 8), -1, np.int32)
    wide[..., : ids.shape[2]] = ids
    return {
        "forward_pass_id": 0, "rank": 0, "gatherer_key": "primary", "topk_ids_of_layer": wide,
        "input_ids": list(input_ids), "positions": list(positions),
        "extend_seq_lens": None if lengths is None else list(lengths), "forward_mode": 2 if lengths is None else 1,
        "global_physical_count": np.zeros((3, 6), np.int64), "misc_objects": [],
    }  # fmt: skip


def sglang_response(ids: NDArray[np.int32], *, prompt_tokens: int, name: str = "r", **meta: Any) -> dict[str, Any]:
    """A response of /generate with routed_experts: base64 of int32 (tokens - 1, all decoder layers, k)."""
    facts = {"id": name, "prompt_tokens": prompt_tokens, "routed_experts": flat(ids), **meta}
    return {"text": "...", "meta_info": facts}


def flat(ids: NDArray[Any], dtype: str = "<i4") -> str:
    """base64 of the bytes of ids, without their shape."""
    return base64.b64encode(np.ascontiguousarray(ids, dtype).tobytes()).decode()


def npy(ids: NDArray[Any], dtype: str = "uint8") -> str:
    """base64 of an .npy file of ids: magic, version 1.0, length of the header, header, data."""
    header = repr({"descr": np.dtype(dtype).str, "fortran_order": False, "shape": ids.shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    return base64.b64encode(data + np.ascontiguousarray(ids, dtype).tobytes()).decode()


def jsonl(path: Path, objects: Sequence[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def encoded(ids: NDArray[Any], dtype: str = "int16") -> dict[str, Any]:
    """Ids as servers around vLLM send them: base64 in an object that says dtype and shape."""
    data = base64.b64encode(np.ascontiguousarray(ids, f"<{np.dtype(dtype).str[1:]}").tobytes()).decode()
    return {"encoding": "base64", "dtype": dtype, "shape": list(ids.shape), "data": data}
