"""What is tried: a rule and its value, as users write them (``top_p=0.3,0.4``, ``ratio=0.1,odp``), and the defaults.

A rule with its value is a :class:`Trial`; two equal trials on the same model and text are the same measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from moescope.errors import InputError

Weights = Literal["renormalized", "kept"]
"""What becomes of the gate weights of the experts that stay: scaled up to the sum of all before, or as they were."""

Rule = Literal["top_k", "top_p", "ratio", "threshold", "null_experts", "mask_top", "shared", "plan"]

SKIPPING: tuple[Rule, ...] = ("top_p", "ratio", "threshold", "null_experts")
"""Rules by which a token may use fewer experts than another: they need a router that chooses two or more."""

ODP = "odp"
"""Value of ``ratio``: each layer's own median of second over first gate weight, taken from other text."""

SHARED = ("off", "replaced")
"""Values of ``shared``: the shared experts put out zero; the same, with one routed expert more per token instead."""

_BOUNDS: dict[str, tuple[float, float]] = {
    "top_p": (0.0, 1.0),
    "ratio": (0.0, 1.0),
    "threshold": (0.0, math.inf),
    "null_experts": (-math.inf, math.inf),
    "mask_top": (0.0, 1.0),
}


@dataclass(frozen=True)
class Trial:
    """One rule with its value.

    Attributes:
        rule: which.
        value: of the rule; a number, or a word (``odp``, ``off``, ``replaced``, the digest of a plan).
        weights: what becomes of the gate weights; of rules that leave a sum behind.
    """

    rule: Rule
    value: float | str
    weights: Weights = "renormalized"

    @property
    def name(self) -> str:
        """As it is typed: ``top_p=0.4``; where gate weights are left as they were, it says so."""
        shown = self.value[:12] if isinstance(self.value, str) else f"{self.value:g}"
        return f"{self.rule}={shown}" + (", weights kept" if self.weights == "kept" else "")


def parse_rules(texts: Sequence[str], *, weights: Weights = "renormalized") -> list[Trial]:
    """Trials from ``NAME=VALUE,VALUE``, each once, in the order given.

    Raises:
        InputError: an unknown rule, or a value that it does not take.
    """
    found = [trial for text in texts for trial in _parsed(text, weights)]
    return list(dict.fromkeys(found))


def default_trials(top_k: int, num_experts: int, *, weights: Weights = "renormalized") -> list[Trial]:
    """What is tried where nothing is asked for: other numbers of experts, top-p, and ratios with ODP's.

    Args:
        top_k: experts per token of the model's own router.
        num_experts: that it chooses from.
    """
    parts = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    counts = sorted({min(num_experts, max(1, round(top_k * part))) for part in parts} | {min(num_experts, top_k + 1)})
    found = [Trial("top_k", float(count), weights) for count in counts if top_k > 1 or count >= top_k]
    if top_k > 1:
        found += [Trial("top_p", value, weights) for value in (0.3, 0.4, 0.5, 0.6, 0.7)]
        found += [Trial("ratio", value, weights) for value in (0.1, 0.3, 0.5, ODP)]
    return found


def redundancy_trials(*, shared: bool, top_k: int, num_experts: int) -> list[Trial]:
    """DeepSeekMoE's test: without the top share of the routed experts, and without the shared ones.

    Args:
        shared: whether the model has shared experts.
        top_k: experts per token of the model's own router, of which as many have to be left.
        num_experts: that it chooses from.
    """
    shares = sorted({share for share in (1 / 16, 1 / 8, 3 / 16, 1 / 4, 1 / 2) if round(share * num_experts) >= 1})
    found = [Trial("mask_top", share) for share in shares if num_experts - round(share * num_experts) >= top_k]
    return found + ([Trial("shared", value) for value in SHARED] if shared else [])


def require_sense(trials: Sequence[Trial], *, top_k: int, num_experts: int, shared: bool) -> None:
    """Refuse what cannot be tried on such a model.

    Args:
        top_k: the largest number of experts that its router gives a token.
        num_experts: the fewest that any layer chooses from.
        shared: whether it has shared experts.

    Raises:
        InputError: a rule that skips experts where each token has one, more experts than there are, or shared
            experts where there are none.
    """
    for trial in trials:
        if top_k == 1 and trial.rule in SKIPPING:
            raise InputError(
                f"--rule {trial.name}: each token of this model uses one expert, and there is none to leave out;"
                " try --rule top_k=2,3"
            )
        if trial.rule == "top_k" and isinstance(trial.value, float):
            if trial.value > num_experts:
                raise InputError(f"--rule {trial.name}: a layer has {num_experts} experts; give at most so many")
            if top_k == 1 and trial.value < 1:
                raise InputError(f"--rule {trial.name}: each token needs one expert")
        if trial.rule == "mask_top" and num_experts - round(float(trial.value) * num_experts) < top_k:
            raise InputError(
                f"--rule {trial.name}: of {num_experts} experts fewer than the {top_k} that a token uses would be left"
            )
        if trial.rule == "shared" and not shared:
            raise InputError(f"--rule {trial.name}: this model has no shared experts")


def _parsed(text: str, weights: Weights) -> list[Trial]:
    name, mark, values = text.partition("=")
    known = [rule for rule in get_args(Rule) if rule != "plan"]
    if name not in known:
        raise InputError(f"--rule {text}: there are {', '.join(known)}; write it as top_p=0.3,0.4")
    parts = [part.strip() for part in values.split(",") if part.strip()]
    if not mark or not parts:
        raise InputError(f"--rule {text}: give values, as in {name}={'off' if name == 'shared' else '0.3,0.4'}")
    rule: Rule = name  # type: ignore[assignment]
    return [Trial(rule, _value(rule, part), weights) for part in parts]


def _value(rule: Rule, text: str) -> float | str:
    if rule == "shared":
        if text not in SHARED:
            raise InputError(f"--rule shared={text}: there are {', '.join(SHARED)}")
        return text
    if rule == "ratio" and text == ODP:
        return text
    try:
        number = float(text)
    except ValueError:
        raise InputError(f"--rule {rule}={text}: {text!r} is no number") from None
    if rule == "top_k":
        if not number.is_integer() or number < 1:
            raise InputError(f"--rule top_k={text}: give whole numbers of experts, 1 or more")
        return number
    low, high = _BOUNDS[rule]
    if not math.isfinite(number) or not low <= number <= high:
        raise InputError(f"--rule {rule}={text}: give {'any number' if high == -low else f'{low:g} to {high:g}'}")
    return number
