"""Runs for the tests of placements: counts alone, and layers of different sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions

CONFIG = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_local_experts": 8,
    "num_experts_per_tok": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
EXPERT_BYTES = 3 * 32 * 64 * 2


def counts(directory: Path, config: dict[str, Any] | None = None) -> tuple[Path, np.ndarray]:
    """A run of counts alone, 3 layers of 8 experts, the first ones used most; and the counts (3, 8)."""
    generator = np.random.default_rng(0)
    chosen = [generator.choice(8, 400, p=np.arange(8, 0, -1) / 36) for _ in range(3)]
    lines = [f"{layer},{expert}" for layer, row in enumerate(chosen) for expert in row.tolist()]
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "counts.csv"
    file.write_text("layer,expert\n" + "\n".join(lines))
    known = CONFIG if config is None else config
    options = ImportOptions(config=known, num_experts=8, top_k=2)
    path = import_run("csv", file, directory=directory / "runs", name="counts", options=options)
    return Path(path), np.array([np.bincount(row, minlength=8) for row in chosen])
