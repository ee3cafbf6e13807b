"""What a family's router returns, and what its score over all experts is before selection.

Decorated families return ``(router_logits, top_k_weights, top_k_index)``. The tables below hold the exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Score = Literal["softmax", "sigmoid", "unknown"]
"""How logits become the router probability: over all experts by softmax; each by its own sigmoid; or in another way."""

ROUTER_NAMES = ("gate", "router")
"""Names under which the routers stand beside their experts, for those that the library's recorders leave out."""

_SIGMOID = (
    *("AXK1", "AXK2", "Afmoe", "BailingHybrid", "Beam", "DeepseekV3", "Dots1", "Dots3Note", "ExaoneMoe", "Flint"),
    *("Glm4Moe", "Glm4vMoe", "Glm5Next", "GlmMoeDsa", "HYV3", "HYV4", "Inkling", "KimiLinear", "Kolibri1", "Laguna"),
    *("Lfm2Moe", "Llama4", "MiMoV2Flash", "MiniMaxM2", "MiniMaxM3VL", "MuseSpark", "NemotronH", "SolarOpen", "Step3p7"),
)
_FUNCTION_FIELDS = ("scoring_func", "expert_selection_fn", "score_function", "scoring_function")
_PROBABILITIES = ("Gemma4TextRouter", "DiffusionGemmaTextRouter")


@dataclass(frozen=True)
class RouterTraits:
    """What a router's tuple means.

    Attributes:
        score: how logits become the router probability.
        holds_probabilities: what stands in the place of the logits are softmax probabilities already.
        may_skip: a token may have fewer than k experts: ids of -1 are a part of the selection, not an error.
        zero_weight_is_none: a gate weight of exactly 0 means "no expert": the router skipped the token.
    """

    score: Score = "softmax"
    holds_probabilities: bool = False
    may_skip: bool = False
    zero_weight_is_none: bool = False


def router_traits(*, router_class: str, experts_class: str, config: Any = None) -> RouterTraits:
    """What is known about a family's router, by class names and, where the score is a setting, by its configuration."""
    return RouterTraits(
        score=_score(router_class or experts_class, config), holds_probabilities=router_class in _PROBABILITIES
    )


def find_router_outputs(outputs: Any, *, logits_index: int, top_k: int) -> tuple[Any, Any]:
    """Logits and selected ids out of what a router returned; None for what is not there.

    Args:
        outputs: the router's return value.
        logits_index: place of the logits in it, as the library's recorder declares it.
        top_k: experts per token, which tells the ids from other integer tensors.
    """
    values: Sequence[Any] = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    logits: Any = values[logits_index] if logits_index < len(values) else None
    if getattr(logits, "ndim", 0) < 2 or not logits.is_floating_point():
        logits = None
    integer = [value for value in values if getattr(value, "ndim", 0) >= 2 and not value.is_floating_point()]
    ids = next((value for value in integer if value.shape[-1] == top_k), None)
    return logits, ids


def _score(class_name: str, config: Any) -> Score:
    for name in _FUNCTION_FIELDS:
        function = getattr(config, name, None)
        if isinstance(function, str):
            return function if function in ("softmax", "sigmoid") else "unknown"  # type: ignore[return-value]
    if class_name.startswith("Phimoe"):
        return "softmax"  # sparsemixer selects otherwise, yet its weights are parts of the same softmax
    return "sigmoid" if class_name.startswith(_SIGMOID) else "softmax"
