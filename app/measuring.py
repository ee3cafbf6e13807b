"""Plans measured on a model: edited in memory, held against the model as it was, and put back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    import store
    from compressor.plan import Plan
    from planner import Measurement
    from profiler.corpus import Corpus


def measuring(run: store.Run, model: nn.Module, corpus: Corpus) -> Callable[[Plan], Measurement]:
    """What tells the cost of a plan: KL divergence from the model as it is, nats per token, in all and by domain.

    Args:
        run: gives second moments to the merges that need them.
        model: the run's model; after each measurement it is as it was.
        corpus: the text.
    """
    from app.moments import Moments
    from compressor.memory import edited
    from planner.finalists import Damage, Measurement
    from profiler.evaluation import BaseDistribution

    base = BaseDistribution.of(model, corpus.batches())

    def measure(plan: Plan) -> Measurement:
        with edited(model, plan, moments=Moments(run, plan) or None):
            found = base.against(model)
        domains = {name: Damage(one.kl, one.low, one.high, one.tokens) for name, one in found.per_domain.items()}
        return Measurement(found.kl, found.low, found.high, found.tokens, domains=domains)

    return measure


def seen_before(run: store.Run, corpus: Corpus) -> str | None:
    """Why figures from a text flatter plans of a run: the run read it, or from its files. None = nothing tells so."""
    settings = run.info.settings
    if corpus.sha256 == str(settings.get("corpus_sha256") or ""):
        return "The text is the very text that the run was recorded on: what is measured on it flatters the plans."
    read = {place_of(name) for name in settings.get("files") or ()}
    shared = [name for name in corpus.describe()["files"] if place_of(name) in read]
    if shared:
        return (
            f"The run has read from {shared[0]} too: what is measured on it flatters the plans, unless these are other"
            " parts of it."
        )
    return None


def place_of(name: str) -> str:
    """What tells a file from others, however its path is written; the name of a hub dataset as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name
