"""After a plan was applied: source and result are loaded and held against each other, where memory holds both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.autoround import Report
    from compressor.edits.moments import LayerMoments
    from compressor.plan import LayerKey, Plan

COPIES = 3
"""Models in memory at once: the source, the result, and the experts of the source as the plan leaves them."""


def check(
    plan: Plan,
    *,
    source: str,
    destination: Path,
    source_bytes: int,
    report: Report | None = None,
    moments: Mapping[LayerKey, LayerMoments] | None = None,
    skip: bool = False,
) -> dict[str, Any] | None:
    """What a loaded result is, as a document for the store; None for plans that quantize nothing.

    Args:
        plan: what was done.
        source: folder of the source, or its hub id.
        destination: folder of the result.
        source_bytes: size of the source's weights.
        report: what AutoRound's process saw; None = the result is of our own backend.
        moments: second moments, for merges by method ``subspace``.
        skip: load no model.

    Raises:
        ModelError: the source cannot be loaded.
    """
    if not any(step.step == "quantize" for step in plan.steps):
        return None
    reason = "--no-check-models" if skip else _too_large(source_bytes)
    if report is not None:
        from compressor.autoround.judgement import judged

        return {**judged(plan, report, None if reason else _load(source)).content(), "routing": None}
    return unchecked(reason) if reason else _own(plan, source, destination, moments)


def unchecked(reason: str) -> dict[str, Any]:
    """The document where no model was loaded."""
    from compressor.selfcheck import SelfCheck

    return {**SelfCheck(not_checked=(f"loaded models: {reason}",)).content(), "routing": None}


def words(document: Mapping[str, Any]) -> str:
    """A short verdict, in one sentence."""
    if document["failure"]:
        return f"self-check failed: {document['failure']}"
    parts = []
    if document["weights"] is not None:
        parts.append(f"{len(document['weights']['rows']):,} matrices as wide as planned")
    if document["logits"] is not None:
        logits = document["logits"]
        parts.append(f"logits differ from the plan's by {logits['relative']:.1e} (KL {max(logits['kl'], 0):.1e})")
    if document["routing"]:
        mean = sum(layer["flips"] for layer in document["routing"]) / len(document["routing"])
        parts.append(f"{mean:.1%} of the routers' selections are others than before")
    parts += [f"not checked: {sentence}" for sentence in document["not_checked"]]
    return "self-check: " + "; ".join(parts)


def _own(plan: Plan, source: str, destination: Path, moments: Mapping[LayerKey, LayerMoments] | None) -> dict[str, Any]:
    from compressor.selfcheck import SelfCheck, self_check

    before = _load(source)
    try:
        after = _load(str(destination))
    except ModelError as error:
        return {**SelfCheck().content(), "failure": str(error), "passed": False, "routing": None}
    ids = _ids(before)
    # The loader refuses checkpoints that lack weights, or have them in other shapes.
    info: dict[str, Any] = {"missing_keys": (), "mismatched_keys": ()}
    found = self_check(before, after, plan, ids, info=info, moments=moments)
    return {**found.content(), "routing": _routing(plan, before, after, ids)}


def _routing(plan: Plan, before: Any, after: Any, ids: Tensor) -> list[dict[str, Any]]:
    from compressor.plan import experts_after, kept_layers
    from profiler.evaluation.router_shift import router_shift

    kept = {key: [expert.members for expert in experts] for key, experts in experts_after(plan).items()}
    return [asdict(layer) for layer in router_shift(after, before, ids, kept=kept, kept_layers=kept_layers(plan))]


def _ids(model: Any) -> Tensor:
    """(1, 64) any tokens, the same every time."""
    import torch

    from compressor.selfcheck import TOKENS

    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, int(text.vocab_size), (1, TOKENS), generator=generator)


def _load(source: str) -> Any:
    from compressor import load
    from compressor.checkpoint.files import Checkpoint

    return load(Checkpoint.open(source).folder)


def _too_large(size: int) -> str:
    """Why models are not loaded; empty where memory holds them."""
    from app.text import size as sized

    free = _available()
    if free is None:
        return "the free memory of this machine is not known"
    needed = COPIES * size
    return f"they take {sized(needed)}, and {sized(free)} are free" if needed > free else ""


def _available() -> int | None:
    """Bytes of memory that are free on this machine; None where nothing says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
