"""What the checks of compression have in common: the bundled model, its texts in two halves, and how it is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.compression import corpus_of, documents
from compressor.memory import edited
from compressor.plan import Plan
from profiler import load_model, load_tokenizer
from profiler.collect import collect
from profiler.corpus import Corpus
from profiler.evaluation.distribution import BaseDistribution, Divergence
from sample_data import MODEL

CALIBRATION, HELD_OUT = 24_000, 16_000
"""Tokens, about; of other documents each."""


@dataclass(frozen=True)
class Bench:
    """The bundled model and its texts.

    Attributes:
        model: in float32.
        tokenizer: its own.
        calibration: the first half of each domain's documents.
        held_out: the second half.
        folder: for runs.
    """

    model: nn.Module
    tokenizer: Any
    calibration: Corpus
    held_out: Corpus
    folder: Path

    def run(self, name: str, level: str = "routing,activations", **options: Any) -> Path:
        """Collect a run of the model as it is now, on the calibration text."""
        return collect(
            self.model, corpus=self.calibration, name=name, tokenizer=self.tokenizer, store=self.folder, level=level,
            headline=False, **options,
        )  # fmt: skip

    def base(self) -> BaseDistribution:
        """What the model predicts now, on the held-out text."""
        return BaseDistribution.of(self.model, self.held_out.batches())


@contextmanager
def bench() -> Iterator[Bench]:
    """While entered, the model is loaded, and there is a folder for its runs."""
    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu"), load_tokenizer(MODEL)
    halves = documents()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration, held_out = (
            corpus_of({domain: both[half] for domain, both in halves.items()}, folder / part, tokenizer, tokens)
            for half, (part, tokens) in enumerate([("calibration", CALIBRATION), ("held-out", HELD_OUT)])
        )
        yield Bench(model, tokenizer, calibration, held_out, folder)


def cost(model: nn.Module, base: BaseDistribution, plan: Plan) -> Divergence:
    """How far the plan takes the model from its base."""
    with edited(model, plan):
        return base.against(model)


def interval(found: Divergence) -> str:
    """KL with its interval."""
    return f"{found.kl:.4f} [{found.low:.4f}, {found.high:.4f}]"
