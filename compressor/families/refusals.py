"""Families whose experts are known but not watched, each with its reason. ``docs/adapters.md`` says how to add one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """Why a module cannot be watched: the class, the reason, and what the user can do."""

    experts_class: str
    reason: str
    remedy: str


_ADAPTER = "moescope has no adapter for it (docs/adapters.md)"
_REASONS: dict[str, tuple[str, str]] = {
    "NllbMoeExperts": (
        "transformers runs the wrong experts here: it reads the one-hot mask of the first choice as expert ids, so that"
        " only experts 0 and 1 ever run",
        "no capture of this family means anything until that is fixed",
    ),
    "Llama4TextExperts": (
        "its gate weights multiply the experts' input, and every expert runs on every token",
        _ADAPTER,
    ),
    "JetMoeMoE": ("its experts are two separate projections, and it routes attention heads too", _ADAPTER),
    "JetMoeMoA": ("its experts are attention heads", _ADAPTER),
    "LongcatFlashExperts": ("a part of its experts are identities outside the experts interface", _ADAPTER),
    "SwitchTransformersExperts": ("its experts are separate modules, and tokens are dropped by capacity", _ADAPTER),
    "DogeCDMoE": ("its experts are single rows found by product keys", _ADAPTER),
    "Mxfp4GptOssExperts": (
        "its MXFP4 kernel routes inside and never calls the experts module",
        "load the model with quantization_config=Mxfp4Config(dequantize=True)",
    ),
    "MegaBlocksMoeMLP": (
        "its kernel routes inside and never calls the experts module",
        "load the model without use_kernels=True",
    ),
}


def refusal_of(module: Any) -> Refusal | None:
    """Why this module cannot be watched, by its class or a parent class; None where nothing is known against it."""
    for parent in type(module).__mro__:
        if parent.__name__ in _REASONS:
            reason, remedy = _REASONS[parent.__name__]
            return Refusal(type(module).__name__, reason, remedy)
    return None
