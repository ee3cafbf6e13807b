"""Small synthetic traces and what they must give; computed with the published code and the paper's formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

REFERENCE = Path(__file__).parents[2] / "reference"
NAMES = ["trace-8x2", "trace-16x2", "trace-32x4"]


def reference(name: str) -> tuple[NDArray[Any], int, dict[str, Any]]:
    """Selections (layers, sequences, tokens, k), number of experts, and the values by metric."""
    values = json.loads((REFERENCE / f"{name}.json").read_text())
    with np.load(REFERENCE / f"{name}.npz") as archive:
        return archive["experts"], values["shape"]["num_experts"], values
