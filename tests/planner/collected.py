"""Runs of tiny models at all levels that plans rest on, and tasks on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import profiler
import store
from planner.guard import Guard
from planner.presets import Preset
from planner.source import source_of
from planner.task import Task
from tests.profiler.capture.tiny import batch

ROOT = Path(__file__).parents[2]
DOMAINS = ("code", "german")
LEVELS = "activations,similarity,gradients"


def sample() -> store.Run:
    """The bundled run."""
    return store.open_run(ROOT / "sample_data" / "runs" / "sample.duckdb")


def collected(model: Any, folder: Path, *, level: str = LEVELS, **options: Any) -> store.Run:
    """A run of two batches in two domains, one backward each where gradients are wanted."""
    options.setdefault("similarity_every", 1)
    with profiler.watch(model, store=folder, name="tiny", level=level, **options) as session:
        for seed in (1, 2):
            inputs = batch(rows=3, length=24, seed=seed)
            session.label(domains=["code", "german", "code"])
            if "gradients" in level:
                logits = model(**inputs).logits[:, :-1].transpose(1, 2)
                torch.nn.functional.cross_entropy(logits, inputs["input_ids"][:, 1:], reduction="sum").backward()
            else:
                with torch.no_grad():
                    model(**inputs)
    assert session.path is not None
    return store.open_run(session.path)


def asked(preset: Preset) -> dict[str, float]:
    """How much, in the words of the preset: bits where it quantizes, else a share."""
    return {"bits": 4.5} if preset.step == "quantize" else {"share": 0.25}


def task(run: store.Run, **changes: Any) -> Task:
    """What is to be planned, without a guard."""
    known: dict[str, Any] = {
        "source": source_of(run), "domains": tuple(run.domains), "share": 0.25, "form": "uniform", "guard": Guard(),
    }  # fmt: skip
    return Task(run=run, **{**known, **changes})
