"""Experts that are known but cannot be watched, or are none of a token, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """Why a module cannot be watched: the class, the reason, and what the user can do."""

    experts_class: str
    reason: str
    remedy: str


_REASONS: dict[str, tuple[str, str]] = {
    "NllbMoeExperts": (
        "transformers runs the wrong experts here: it reads the one-hot mask of the first choice as expert ids, so that"
        " only experts 0 and 1 ever run",
        "no capture of this family means anything until that is fixed",
    ),
    "VitPoseNaiveMoe": (
        "its experts are chosen by the number of the data set, and no token is routed",
        "there is no routing to profile",
    ),
    "MegaBlocksMoeMLP": (
        "its kernel routes inside and never calls the experts module",
        "load the model without use_kernels=True",
    ),
}

_LEFT_OUT = {"JetMoeMoA": "attention heads chosen by a router of their own"}
"""Experts beside the feed-forward ones that are never recorded, and what they are."""


def left_out_reason(module: Any) -> str:
    """What experts of another kind this module holds, which are not recorded; empty for everything else."""
    return next((_LEFT_OUT[parent.__name__] for parent in type(module).__mro__ if parent.__name__ in _LEFT_OUT), "")


def refusal_of(module: Any) -> Refusal | None:
    """Why this module cannot be watched, by its class or a parent class; None where nothing is known against it."""
    for parent in type(module).__mro__:
        if parent.__name__ in _REASONS:
            reason, remedy = _REASONS[parent.__name__]
            return Refusal(type(module).__name__, reason, remedy)
    return None
