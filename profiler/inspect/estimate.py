"""Memory, disk and time of a collection, from shapes alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from profiler.capture.discovery import MoEModel

GIB = 1 << 30
WEIGHT_BYTES = {"float32": 4.0, "16 bit": 2.0, "8 bit": 1.0, "4 bit": 0.5}
TRACE_BYTES = 1.9  # per selection in a run file: expert id and 8-bit gate weight (14 to 17 bytes for top-8, measured)
ERROR_RUNS = (15, 27)  # forwards of a routed and of a shared expert that a sampled token takes at level errors
TEXT_BYTES = 5  # per token: its id and whether it is special
GRID_OPERATIONS = 15_000  # per weight: products of matrices that take as long as trying it on all grids (measured)
EFFICIENCY = 0.5  # share of a plain matrix product's speed that a forward reaches; an assumption


def forward_bytes(found: MoEModel, tokens: int, width: float) -> float:
    """Logits, residual stream and the rows of the largest MoE layer of one batch, without any recording."""
    hidden, vocabulary = (int(getattr(found.config, name, 0)) for name in ("hidden_size", "vocab_size"))
    rows = max(layer.top_k * (2 * hidden + 3 * layer.expert_width) for layer in found.layers)
    return tokens * (vocabulary + 6 * hidden + rows) * width


def flops_per_token(model: nn.Module, found: MoEModel, active: int, sequence_length: int) -> float:
    """Two per active weight (an embedding that is only looked up costs nothing), and causal attention over T / 2."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    looked_up = embedding.weight.numel() if head is None or head.weight is not embedding.weight else 0
    heads = int(getattr(found.config, "num_attention_heads", 0) or 0)
    size = int(getattr(found.config, "head_dim", 0) or 0) or int(found.config.hidden_size) // max(1, heads)
    return 2.0 * (active - looked_up) + 2.0 * len(found.stack) * heads * size * sequence_length


def errors_operations(found: MoEModel, tokens: int) -> float:
    """What level errors adds to a collection: each expert's weights on all grids once, and its sampled tokens.

    Args:
        found: the model.
        tokens: sampled tokens of a layer.
    """
    total = 0.0
    for layer in found.layers:
        hidden = layer.layout.hidden_size if layer.layout is not None else int(found.config.hidden_size)
        expert = 3 * hidden * layer.expert_width
        shared = 0 if layer.shared is None else sum(part.numel() for part in layer.shared.module.parameters())
        total += GRID_OPERATIONS * (layer.num_experts * expert + shared)
        total += 2.0 * tokens * (ERROR_RUNS[0] * layer.top_k * expert + ERROR_RUNS[1] * shared)
    return total


def measure_gflops(dtype: str = "float32", *, seconds: float = 0.4) -> float:
    """GFLOP/s of matrix products on the device that ``collect`` would use; the best of the repetitions in the time."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if device == "cuda" else 768
    matrix = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        began = time.perf_counter()
        _ = (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def checkpoint_gib(path: Path) -> float | None:
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    sizes = [file.stat().st_size for file in files]
    return sum(sizes) / GIB if sizes else None


def available_gib() -> float | None:
    """Free memory of the device that ``collect`` would use; None where it cannot be told."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / GIB
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith("MemAvailable")), None)
