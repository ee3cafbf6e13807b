"""Adapters: what has to be said of experts that are not called, kept or meant as in the library's experts interface.

One entry of :data:`ADAPTERS` makes a family watchable: the class name of its experts, and what differs there. Whatever
an adapter leaves out is as in the library. ``docs/adapters.md`` shows how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compressor.families.calls import Call, Selection, read_call, read_output
from compressor.families.layout import ExpertsLayout, describe_experts, is_fused_experts, stacked_layout
from compressor.families.routers import Score
from compressor.families.special.dbrx import dbrx_layout
from compressor.families.special.doge import doge_layout, doge_output, read_doge
from compressor.families.special.jetmoe import jetmoe_layout, jetmoe_output, read_jetmoe
from compressor.families.special.llama4 import llama4_layout, llama4_output, read_llama4
from compressor.families.special.longcat import longcat_layout
from compressor.families.special.packed import no_layout, read_mxfp4
from compressor.families.special.switch import read_switch, switch_layout

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["token", "sequence"]
"""What is routed: each token by itself, or all tokens of a sequence alike."""


@dataclass(frozen=True)
class Adapter:
    """How to watch one class of experts modules.

    Attributes:
        layout: module -> how its weights are kept; None where that cannot be said (level routing only).
        read: call -> (hidden, ids, weights), token by token.
        output: call -> (tokens, hidden) the experts' weighted sum, if the module returns more than that.
        weights_input: the gate weight multiplies the expert's input, and its output is added as it is.
        may_skip: a token may have fewer than k experts; then its ids are -1 there, and its weights 0.
        zero_weight_is_none: a gate weight of exactly 0 means "no expert", whatever id stands beside it.
        granularity: what is routed.
        routers: names of the routers, in the module or around it, where they are other than ``gate`` and ``router``; a
            list of modules holds one for each call of the experts.
        logits_index: place of the logits in what those routers return.
        score: how their logits become probabilities, where it is no softmax.
        owners: module -> for each expert the (layer, expert) whose weights it runs, where layers share experts.
        packed: the weights stay packed, and the module's own ``forward(hidden, ids, weights)`` is the one way to what
            single experts put out.
        method: by which method the model calls the module.
    """

    layout: Callable[[Any], ExpertsLayout | None] = describe_experts
    read: Callable[[Call], Selection] = read_call
    output: Callable[[Call], Tensor] = read_output
    weights_input: bool = False
    may_skip: bool = False
    zero_weight_is_none: bool = False
    granularity: Granularity = "token"
    routers: tuple[str, ...] = ()
    logits_index: int = 0
    score: Score | None = None
    owners: Callable[[Any], Sequence[tuple[int, int]]] | None = None
    packed: bool = False
    method: str = "forward"


FUSED = Adapter()
"""What holds for the families that go through the library's interface."""

ADAPTERS: dict[str, Adapter] = {
    "DbrxExperts": Adapter(dbrx_layout),
    "DogeCDMoE": Adapter(doge_layout, read_doge, doge_output),
    "FP8Experts": Adapter(packed=True),
    "GgufExperts": Adapter(no_layout, packed=True),
    "JetMoeMoE": Adapter(jetmoe_layout, read_jetmoe, jetmoe_output),
    "Llama4TextExperts": Adapter(llama4_layout, read_llama4, llama4_output, weights_input=True),
    "LongcatFlashExperts": Adapter(longcat_layout),
    "Mxfp4GptOssExperts": Adapter(no_layout, read_mxfp4, packed=True, method="forward_routed"),
    "Step3p7Experts": Adapter(stacked_layout("gate_up_proj")),
    "SwitchTransformersExperts": Adapter(switch_layout, read_switch, may_skip=True),
    "ZayaExperts": Adapter(zero_weight_is_none=True, may_skip=True),
}
"""Class name of the experts module -> what is special about it."""


def adapter_of(module: Any) -> Adapter | None:
    """What to know about a module that holds experts, by its class or a parent class; None for any other module."""
    names = (parent.__name__ for parent in type(module).__mro__)
    own = next((ADAPTERS[name] for name in names if name in ADAPTERS), None)
    return own or (FUSED if is_fused_experts(module) else None)
