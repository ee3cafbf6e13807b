"""Size against cost over all methods and mixtures, priced from a run's sums: where a budget stands, unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from planner.candidates import Request, candidates, what_it_does
from planner.estimate.parameters import expert_parameters, sizes_before
from planner.estimate.prediction import Calibration
from planner.recommendation import Candidate
from planner.source import source_of, value_bytes

SIZES = (0.13, 0.16, 0.19, 0.22, 0.26, 0.32, 0.4, 0.5, 0.65, 0.8)
"""Parts of the experts' bytes at which everything is tried."""

QUICK_SIZES = (0.13, 0.19, 0.26, 0.4, 0.65)
"""Those of a first look."""

QUICK_PRESETS = ("error_bits", "mixed", "stream_slim", "budgeted_reap", "camera_p", "edgemoe")
"""What a first look tries: one or two of each kind, those that are worked out quickly and lead most often."""

QUICK_SHARES = (0.25,)
"""What mixtures cut in a first look."""


def quick(request: Request) -> Request:
    """The same request for a first look, which takes seconds: fewer presets, and mixtures of one share."""
    return replace(request, presets=QUICK_PRESETS, shares=QUICK_SHARES)


def curve(
    request: Request,
    *,
    sizes: Sequence[float] = SIZES,
    calibration: Calibration | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """The candidates of all sizes, by size; no model is run, and what does the same stands once.

    Args:
        request: its memory does not count.
        sizes: parts of the experts' bytes, 0..1, at which everything is tried.
        calibration: what prices rest on.
        tell: told how far it is.
    """
    source, size = source_of(request.run), value_bytes(request.run) or 2
    whole = expert_parameters(source, sizes_before(source)) * size
    found: dict[str, Candidate] = {}
    for number, part in enumerate(sizes, 1):
        if tell is not None:
            tell(f"size {number} of {len(sizes)}: {part:.0%} of the experts")
        tried, _ = candidates(replace(request, memory=request.other_weights + int(whole * part)), calibration)
        for one in tried:
            found.setdefault(what_it_does(one.plan), one)
    return sorted(found.values(), key=lambda one: (one.bytes, one.score, one.plan.digest))


def pareto(found: Iterable[Candidate]) -> list[Candidate]:
    """Those that nothing smaller or as small matches, by size."""
    best: list[Candidate] = []
    for one in sorted(found, key=lambda one: (one.bytes, one.score)):
        if one.kl is not None and (not best or one.score < best[-1].score):
            best.append(one)
    return best
