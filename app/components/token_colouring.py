"""What colours the tokens: the choice of a measure with what it asks for, and the measure of the part that is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app import data, focus, state
from app.exhibits import tokens as exhibits
from app.frames import token_flips, token_measures, token_misses, tokens
from app.frames.expert import importance
from app.frames.expert_trace import layer_info
from app.frames.token_measures import Measured
from app.frames.token_routes import Routes
from store import Run

MODES = {
    "expert": "first expert",
    "entropy": "entropy",
    "margin": "margin",
    "misses": "cache misses",
    "importance": "importance",
    "weight": "weight of the expert",
    "flip": "flips",
}
_OVER_LAYERS = ("entropy", "margin", "importance", "flip")
_LAYERS = {"focused": "the focused one", "all": "mean of all"}


@dataclass(frozen=True)
class Colouring:
    """How the tokens are coloured: mode of :data:`MODES`, over one layer or all, and what the mode asks for."""

    mode: str = "expert"
    label: str = ""
    every: bool = False
    expert: int = 0
    score: str = "frequency"
    policy: str = "lru"
    slots: int = 1

    def choices(self) -> dict[str, object]:
        """The choices of the exhibit ``measure_along``."""
        return {
            "measure": self.mode, "layer": self.label, "every": self.every, "expert": self.expert, "score": self.score,
            "policy": self.policy, "slots": self.slots,
        }  # fmt: skip


def choose(run: Run, others: list[str]) -> str:
    """The mode, of those that this run and its neighbours in the store allow."""
    lacking = {
        "flip": not others or run.live,
        "misses": any(layer.stack != "decoder" for layer in run.layers),
        "weight": "weights" in run.omissions,
        "entropy": "weights" in run.omissions and not run.has_scores,
        "margin": "weights" in run.omissions and not run.has_scores,
    }
    modes = [mode for mode in MODES if not lacking.get(mode, False)]
    return state.choose("Colour by", modes, key="colour", words=MODES.__getitem__)


def options(run: Run, mode: str) -> Colouring:
    """What the mode asks for."""
    label, expert = focus.current().layer_in(run), focus.current().expert_in(run)
    every, score, policy, slots = False, "frequency", "lru", 1
    if mode in _OVER_LAYERS and len(run.layers) > 1:
        every = state.choose("Layers", list(_LAYERS), key="layers", words=_LAYERS.__getitem__, segmented=True) == "all"
    if mode == "importance":
        titles = token_measures.score_names(data.frame(importance, run))
        score = state.choose("Score", list(titles), key="score", words=titles.__getitem__) if titles else score
    if mode == "misses":
        policies = token_misses.POLICY_NAMES
        policy = state.choose("Cache policy", list(policies), key="policy", default="lru", words=policies.__getitem__)
        most = layer_info(run, label).num_experts
        slots = state.choose_number(
            "Experts in the cache", key="slots", low=1, high=most, default=exhibits.default_slots(run, label),
            help=f"of the {most} of layer {label}",
        )  # fmt: skip
    return Colouring(mode, label, every, expert, score, policy, slots)


def measured(
    run: Run, routes: Routes, colouring: Colouring, *, sequence: int, other: Callable[[], tuple[Run, int] | None]
) -> Measured | None:
    """The measure of the part; None for mode "expert".

    Args:
        other: the other run and the number that the sequence has there; None = it is not there.

    Raises:
        MoescopeError: the run does not hold what it is taken from, or the runs cannot be compared.
    """
    if colouring.mode == "expert":
        return None
    if colouring.mode == "flip":
        return _flips(run, routes, colouring, other())
    choices = {name: value for name, value in colouring.choices().items() if name not in ("measure", "layer")}
    return exhibits.measured(
        run, data.frame, sequence=sequence, first=routes.start, name=colouring.mode, label=colouring.label,
        routes=routes, **choices,  # type: ignore[arg-type]
    )  # fmt: skip


def _flips(run: Run, routes: Routes, colouring: Colouring, there: tuple[Run, int] | None) -> Measured | None:
    if there is None:
        return None
    other, number = there
    last = routes.start + routes.count - 1
    theirs = data.large(tokens.routes, other, sequence=number, first=routes.start, last=last)
    labels = routes.labels if colouring.every else [colouring.label]
    values = token_flips.flips(run, other, routes, theirs, labels=labels)
    measure = token_flips.measure(labels, state.code(other.name))
    return Measured(measure, token_measures.of_first(routes, colouring.label, values))


def other_run(run: Run, names: list[str], *, wanted: bool) -> Run | None:
    """The run to compare with, asked for where it is wanted."""
    if not wanted or not names:
        return None
    name = state.choose("Other run", names, key="other", help="the same texts with another checkpoint or precision")
    return data.open_run(data.entries()[name].path)
