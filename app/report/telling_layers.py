"""Which layers tell most: those that a report shows expert by expert, and why each was chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

import store
from app.exhibits.exhibit import Frames, fresh
from app.findings import about_experts
from app.frames import confidence, load, specialization, super_experts
from moescope.errors import MoescopeError


@dataclass(frozen=True)
class TellingLayer:
    """One layer and the reasons for which it was chosen, the first one being what chose it."""

    label: str
    reasons: tuple[str, ...]


def telling_layers(run: store.Run, count: int = 3, *, frames: Frames = fresh) -> list[TellingLayer]:
    """At most ``count`` layers, in the order of the model.

    Each criterion in turn chooses the layer that stands out most by it among those not chosen yet: the least even load,
    the most alike experts, the largest output of an expert, experts that are most for domains, the least decided
    router; then from the beginning again. A run that says nothing of any gives its first layers.
    """
    rankings = [ranking for ranking in (_ranked(make, run, frames) for make in _CRITERIA) if ranking]
    best = [ranking[0][0] for ranking in rankings]
    chosen: dict[str, list[str]] = {}
    turns = 0
    while rankings and len(chosen) < min(count, len(run.layers)) and turns < count * len(_CRITERIA):
        ranking = rankings[turns % len(rankings)]
        left = [(label, why) for label, why in ranking if label not in chosen]
        if left:
            chosen[left[0][0]] = [left[0][1]]
        turns += 1
    for ranking, label in zip(rankings, best, strict=True):
        if label in chosen and ranking[0][1] not in chosen[label]:
            chosen[label].append(ranking[0][1])
    order = [f"{one.layer}" if one.step == 0 else f"{one.layer}.{one.step}" for one in run.layers]
    if not chosen:
        return [TellingLayer(label, ("one of the first layers",)) for label in order[:count]]
    return [TellingLayer(label, tuple(chosen[label])) for label in order if label in chosen]


Ranking = list[tuple[str, str]]
"""(label, why) from what stands out most to what stands out least."""


def _ranked(make: Callable[[store.Run, Frames], Ranking], run: store.Run, frames: Frames) -> Ranking:
    try:
        return make(run, frames)
    except MoescopeError:
        return []


def _uneven(run: store.Run, frames: Frames) -> Ranking:
    found = frames(load.balance, run).drop_nulls("max_violation").sort("max_violation", descending=True)
    return [(label, f"{_nth(place, 'least even load')}: its busiest expert takes {value + 1:.1f} × the mean")
            for place, (label, value) in enumerate(found.select("label", "max_violation").iter_rows())]  # fmt: skip


def _alike(run: store.Run, frames: Frames) -> Ranking:
    found = frames(about_experts.alike, run).sort("mean", descending=True)
    return [(label, f"{_nth(place, 'most alike experts')}: similarity {mean:.2f} of their {about_experts.title(kind)}")
            for place, (label, mean, kind) in enumerate(found.select("label", "mean", "kind").iter_rows())]  # fmt: skip


def _outliers(run: store.Run, frames: Frames) -> Ranking:
    found = frames(super_experts.output_maxima, run).group_by("label", maintain_order=True).first()
    found = found.select("label", "value", "expert")
    return [(label, f"{_nth(place, 'largest output of an expert')}: |{value:.3g}| of expert {expert}")
            for place, (label, value, expert) in enumerate(found.iter_rows())]  # fmt: skip


def _for_domains(run: store.Run, frames: Frames) -> Ranking:
    found = frames(specialization.specialization, run).filter(
        (pl.col("kind") == "domain") & (pl.col("form") == "expert") & pl.col("layer").is_not_null()
    ).sort("value", descending=True)  # fmt: skip
    return [(label, f"{_nth(place, 'experts most for single domains')}: their load varies by {value:.2f} over domains")
            for place, (label, value) in enumerate(found.select("label", "value").iter_rows())]  # fmt: skip


def _undecided(run: store.Run, frames: Frames) -> Ranking:
    found = frames(confidence.confidence, run).filter(pl.col("quantity") == "entropy")
    found = found.with_columns(part=pl.col("mean") / pl.col("num_experts").log()).sort("part", descending=True)
    return [(label, f"{_nth(place, 'least decided router')}: {part:.0%} of the largest possible entropy")
            for place, (label, part) in enumerate(found.select("label", "part").iter_rows())]  # fmt: skip


_CRITERIA = (_uneven, _alike, _outliers, _for_domains, _undecided)


def _nth(place: int, what: str) -> str:
    words = {0: "", 1: "second ", 2: "third "}
    return words.get(place, f"{place + 1}th ") + what
