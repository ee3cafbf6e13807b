"""What a method is asked to do, and what it answers: the two ends that all methods of planning share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

import store
from compressor.plan import LayerKey, LayerShape, Source, Step
from moescope.errors import PlanError
from planner.guard import Guard

Array = NDArray[np.float64]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Task:
    """What is to be planned.

    Attributes:
        run: the run that it rests on.
        source: its model.
        domains: whose text counts, sorted.
        share: part of the experts, neurons or layers to remove, above 0 and below 1.
        form: how the result is stored.
        guard: what may not be cut.
        bits: effective bits that a weight of the experts that stay may take; None where nothing is quantized.
        factors: per MoE layer, what a change of its stream costs against others; None = all alike.
        before: steps that come first; methods that quantize find widths for what these leave.
        kept: what was computed for this run and domains before, so that another share costs little.
    """

    run: store.Run
    source: Source
    domains: tuple[str, ...]
    share: float
    form: str
    guard: Guard
    bits: float | None = None
    before: tuple[Step, ...] = ()
    factors: tuple[float, ...] | None = None
    kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def every_domain(self) -> bool:
        """All domains of the run count."""
        return not set(self.run.domains) - set(self.domains)

    @property
    def layer_factors(self) -> Mapping[LayerKey, float]:
        """(layer, step) -> its factor."""
        keys = [shape.key for shape in self.source.layers]
        return dict(zip(keys, self.factors or [1.0] * len(keys), strict=True))

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """The MoE layers in order.

        In form ``shared`` the router goes on as it is, so that neither its groups nor its k bind what may merge.
        """
        if self.form != "shared":
            return self.source.layers
        free = {"groups": 1, "chosen_groups": 1, "top_k": 1}
        return tuple(shape.model_copy(update=free) for shape in self.source.layers)


@dataclass(frozen=True)
class Draft:
    """What a method decides.

    Attributes:
        steps: of the plan.
        score: what the decision rests on.
        unit: of its values.
        values: (layer, step) -> (experts,); larger = more important; NaN where there is none.
        kept_mass: part of the score that stays, 0..1; None where the score does not add up.
        notes: sentences for the reader.
    """

    steps: tuple[Step, ...]
    score: str
    unit: str
    values: Mapping[LayerKey, Array]
    kept_mass: float | None = None
    notes: tuple[str, ...] = ()


def once(kept: dict[Any, Any], name: Any, work: Callable[[], Value]) -> Value:
    """What was worked out before under a name, else what ``work`` gives, remembered; that it cannot be, too."""
    if name not in kept:
        try:
            kept[name] = work()
        except PlanError as error:
            kept[name] = error
    found: Value | PlanError = kept[name]
    if isinstance(found, PlanError):
        raise found.with_traceback(None)
    return found


def rounded(values: Array) -> Array:
    """Values to 6 significant digits: what decisions are made on and what plans show, the same on every machine."""
    flat = np.asarray(values, dtype=np.float64)
    return np.array([float(f"{value:.6g}") for value in flat.ravel()]).reshape(flat.shape)
