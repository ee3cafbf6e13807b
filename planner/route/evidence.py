"""What a trace says of a route step: active experts, kept mass, changed tokens and load, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

import store
from compressor.plan import LayerKey, RouteStep, Source
from moescope.cluster import Cluster
from planner.simulate.what_if import Refused, WhatIf, method_named, what_if

LIVE = "What it does to the loss needs a live run: moescope sweep MODEL --plan PLAN."


@dataclass(frozen=True)
class Told:
    """What is known of a step.

    Attributes:
        found: one result per group of layers with the same value; empty where the trace cannot say.
        source: paper of the rule.
        notes: sentences for the plan's evidence.
    """

    found: tuple[WhatIf, ...]
    source: str
    notes: tuple[str, ...] = ()
    _places: Mapping[LayerKey, tuple[WhatIf, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        places = {key: (one, axis) for one in self.found for axis, key in enumerate(one.layers)}
        object.__setattr__(self, "_places", places)

    @property
    def kept_mass(self) -> float | None:
        """Mean over the layers that change; None where it is not known."""
        values = [float(one.kept_mass[0, axis]) for one, axis in self._places.values()]
        known = [value for value in values if np.isfinite(value)]
        return float(f"{np.mean(known):.6g}") if known else None

    def selections(self, key: LayerKey, expert: int) -> tuple[int, int]:
        """Tokens of an expert before and after; (0, 0) where the trace cannot say."""
        if key not in self._places:
            return 0, 0
        one, axis = self._places[key]
        return int(one.load_before[axis, expert]), int(one.load[0, axis, expert])

    def change_of(self, source: Source) -> int:
        """Expert parameters that a token uses more (less: below 0), mean over tokens."""
        total = 0.0
        for key, (one, axis) in self._places.items():
            shape = source.by_key[key]
            change = float(one.mean_active[0, axis] - one.mean_active_before[axis])
            if np.isfinite(change):
                total += change * shape.width * (3 if source.gated else 2) * source.expert_size
        return round(total)

    def layer_values(self, step: RouteStep) -> dict[LayerKey, tuple[float | None, ...]]:
        """With rule ``bias`` the load of every expert; else one value per layer, its mean active experts."""
        values: dict[LayerKey, tuple[float | None, ...]] = {}
        for key, (one, axis) in sorted(self._places.items()):
            if step.rule == "bias":
                values[key] = tuple(map(float, one.load[0, axis, : one.num_experts[axis]].tolist()))
            else:
                active = float(one.mean_active[0, axis])
                values[key] = (float(f"{active:.6g}") if np.isfinite(active) else None,)
        return values


def told(
    run: store.Run, step: RouteStep, *, domain: str | None = None, limit_tokens: int | None = None,
    cluster: Cluster | None = None, tell: Callable[[str], None] | None = None,
) -> Told:  # fmt: skip
    """Try a step on the trace.

    Args:
        domain: whose text counts; None = all.
        limit_tokens: of the trace at most.
        cluster: whose workers take the layers; None = this process.
        tell: told how far it is.
    """
    method = method_named(step.rule)
    attempt = partial(
        what_if,
        run,
        step.rule,
        weights=step.weights,
        domain=domain,
        limit_tokens=limit_tokens,
        cluster=cluster,
        tell=tell,
    )
    tried: tuple[WhatIf, ...]
    try:
        if step.rule == "bias":
            bias = {(one.layer, one.step): np.array(one.bias) for one in step.layers}
            tried = (attempt(values=[1.0], layers=[layer for layer, _ in bias], bias=bias),)
        else:
            groups: dict[float, list[LayerKey]] = {}
            for one in step.layers:
                groups.setdefault(float(one.value or 0.0), []).append((one.layer, one.step))
            tried = tuple(
                attempt(values=[value], layers=[layer for layer, _ in keys]) for value, keys in groups.items()
            )
    except Refused as refused:
        return Told((), method.source, (f"The trace does not say what the rule does: {refused}", LIVE))
    return Told(tried, method.source, (*_notes(tried), LIVE))


def _notes(tried: tuple[WhatIf, ...]) -> tuple[str, ...]:
    layers = sum(len(one.layers) for one in tried)
    tokens = max(int(one.tokens.max(initial=0)) for one in tried)
    before, after, mass, own, changed, known = (
        _mean([np.ravel(getattr(one, name)) for one in tried])
        for name in ("mean_active_before", "mean_active", "kept_mass", "kept_mass_before", "changed_tokens", "known")
    )
    first = tried[0]
    beside = f" ({own:.1%} as it is)" if own < 0.9995 else ""
    words = (
        f"On {tokens:,} tokens of the trace, {f'mean over {layers} layers' if layers > 1 else 'in one layer'}:"
        f" {after:.2f} active experts instead of {before:.2f}, {mass:.1%}{beside} of {first.mass_of} kept,"
        f" {changed:.1%} of the tokens get other experts."
    )
    share = f" The stored scores prove {known:.1%} of it." if known < 0.9995 else ""
    certain = min((one.certainty for one in tried), key=("needs a live run", "proxy", "exact").index)
    return (words + share, f"{certain[0].upper()}{certain[1:]}: {first.why}", first.convention, *first.notes)


def _mean(parts: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]) -> float:
    values = np.concatenate(parts)
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
