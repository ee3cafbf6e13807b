"""What the tensors of a checkpoint are, by their names: written once for all families.

A name is read from the decoder layer inwards, so that prefixes do not matter (``model.layers``, ``backbone.layers``,
``model.language_model.layers``, ``transformer.blocks``). Families keep experts one by one
(``experts.3.gate_proj.weight``) or all in one tensor (``experts.gate_up_proj``); how such a tensor is turned is decided
by shapes, in :mod:`compressor.checkpoint.slots`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["gate", "up", "down", "gate_up"]
"""Which projection of an expert a tensor holds."""

Kind = Literal[
    "expert", "shared", "router", "router_bias", "selection_bias", "expert_scale", "output_bias", "table", "plain"
]
"""What a tensor of a decoder layer is.

``router``: one row per expert. ``router_bias``: added to the logits. ``selection_bias``: counts for choosing only.
``expert_scale``: one factor per expert's output. ``output_bias``: added to the block's output. ``table``: expert ids
per token id. ``plain``: nothing that knows of experts.
"""

LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?(?:layers|blocks|block|h))\.(?P<layer>\d+)\.(?P<rest>.+)$")
OTHER_STACKS = re.compile(r"(^|\.)(visual|vision|vision_\w+|audio|audio_\w+|talker|code2wav|vit|token2wav)(\.|$)")
"""Stacks of layers that are no decoder of text, by a segment of their prefix."""

PREDICTION_STACKS = re.compile(r"(^|\.)mtp(\.|$)")
"""Layers that predict further tokens (multi-token prediction), where they stand beside the decoder's."""

_PARTS: dict[str, Part] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up", "linear_gate": "gate",
    "w1": "gate", "w3": "up", "w2": "down", "v1": "up", "wi": "up", "wo": "down", "w13": "gate_up",
    "input_linear": "gate_up", "output_linear": "down", "gate_and_up_projs": "gate_up", "down_projs": "down",
}  # fmt: skip
_FUSED_PARTS: dict[str, Part] = {**_PARTS, "fc1": "gate_up", "fc2": "down"}

_NUMBERED = re.compile(
    r"^(?P<block>(?:.*\.)?)experts\.(?:expert_)?(?P<expert>\d+)\.(?P<projection>\w+?)\.(?P<what>.+)$"
)
_FUSED = re.compile(
    r"^(?P<block>(?:.*\.)?)(?:experts\.(?:mlp\.)?)(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj|fc1|fc2|w13|w1|v1|w2"
    r"|gate_and_up_projs|down_projs)(?P<what>(?:[._]\w+)*)$"
)
_LINEAR = re.compile(
    r"^(?P<block>(?:block_sparse_moe|mlp|feed_forward|moe)\.)(?P<projection>input_linear|output_linear)\.(?P<what>weight)$"
)
_SHARED = re.compile(
    r"^(?P<block>(?:.*\.)?)(?:shared_experts?|shared_mlp|share_expert)\.(?P<projection>\w+?)(?:\.(?P<what>\w+))?$"
)
_ROUTER = re.compile(
    r"(^|\.)(?:gate|router|router\.gate|router\.layer|router\.classifier|router\.proj|gate\.wg|gate\.router_mlp\.out_proj)"
    r"\.(?P<what>\w+)$"
)
_SELECTION_BIAS = re.compile(r"(^|\.)(?:e_score_correction_bias|expert_bias|balancing_biases)$")
_EXPERT_SCALE = re.compile(r"(^|\.)per_expert_scale$")
_TABLE = re.compile(r"(^|\.)tid2eid$")
_ATTENTION = re.compile(r"^(self_attn|self_attention|attn|attention|linear_attn|mamba|temporal_block)\b")

BIAS_IS_FOR_CHOOSING = ("deepseek_v4", "inkling_text", "inkling2_text", "inkling", "inkling2", "inkling_mm_model")
"""Families that call their selection bias ``gate.bias`` on disk, as others call a bias of the logits."""

INTERLEAVED = ("gpt_oss",)
"""Families whose ``gate_up_proj`` holds gate and up in turns; ``w13_weight`` does in all (Inkling)."""

REFUSED = {
    "doge": "its experts are single rows of two tables, chosen by products of keys",
    "ernie4_5_vl_moe": "its text and vision experts share one count",
    "ernie4_5_vl_moe_text": "its text and vision experts share one count",
    "nllb-moe": "transformers runs the wrong experts of this family, so that no run of it means anything",
    "switch_transformers": "encoder and decoder share one count of experts, and a run sees one of them",
}
"""Families whose checkpoints are not edited, and why."""


@dataclass(frozen=True)
class TensorName:
    """What one name says.

    Attributes:
        name: as it stands in the checkpoint.
        stack: path of the layers it belongs to; empty outside of layers.
        layer: its number; -1 outside.
        kind: what it is.
        block: path of the MoE block inside the layer, with its dot.
        expert: its number; None where all experts are in one tensor.
        part: which projection, of experts and shared experts.
        what: ``weight``, ``bias``, or what a quantizer keeps beside them.
        packed: all experts one below the other in two dimensions (E * I, H).
        interleaved: gate and up in turns whatever the family.
    """

    name: str
    stack: str = ""
    layer: int = -1
    kind: Kind = "plain"
    block: str = ""
    expert: int | None = None
    part: Part | None = None
    what: str = "weight"
    packed: bool = False
    interleaved: bool = False

    def renumbered(self, *, layer: int | None = None, expert: int | None = None) -> str:
        """The name with another number of the layer or of the expert."""
        if self.layer < 0:
            return self.name
        rest = self.name[len(f"{self.stack}.{self.layer}.") :]
        if expert is not None and self.expert is not None:
            old = re.compile(rf"(experts\.(?:expert_)?){self.expert}\.")
            rest = old.sub(rf"\g<1>{expert}.", rest, count=1)
        return f"{self.stack}.{self.layer if layer is None else layer}.{rest}"


def read_name(name: str, model_type: str) -> TensorName:
    """What a tensor is, by its name and the family's ``model_type``."""
    found = LAYER.match(name)
    if not found:
        return TensorName(name)
    stack, layer, rest = found["stack"], int(found["layer"]), found["rest"]
    if _ATTENTION.match(rest):
        return TensorName(name, stack, layer)
    return (
        _shared(name, stack, layer, rest)
        or _expert(name, stack, layer, rest)
        or _around(name, stack, layer, rest, model_type)
        or TensorName(name, stack, layer)
    )


def _expert(name: str, stack: str, layer: int, rest: str) -> TensorName | None:
    if (found := _NUMBERED.match(rest)) and found["projection"] in _PARTS:
        part, expert = _PARTS[found["projection"]], int(found["expert"])
        return TensorName(name, stack, layer, "expert", found["block"], expert, part, found["what"])
    found = _FUSED.match(rest) or _LINEAR.match(rest)
    if not found:
        return None
    what = found["what"].lstrip("._") or "weight"
    return TensorName(
        name, stack, layer, "expert", found["block"], None, _FUSED_PARTS[found["projection"]], what,
        packed="experts.mlp." in rest, interleaved=found["projection"] == "w13",
    )  # fmt: skip


def _shared(name: str, stack: str, layer: int, rest: str) -> TensorName | None:
    found = _SHARED.match(rest)
    if not found or found["projection"] not in _PARTS:
        return None
    part, what = _PARTS[found["projection"]], found["what"] or "weight"
    return TensorName(name, stack, layer, "shared", found["block"], None, part, what)


def _around(name: str, stack: str, layer: int, rest: str, model_type: str) -> TensorName | None:
    block = rest.partition(".")[0] + "." if "." in rest else ""
    kind: Kind | None = None
    if _SELECTION_BIAS.search(rest):
        kind = "selection_bias"
    elif _EXPERT_SCALE.search(rest):
        kind = "expert_scale"
    elif _TABLE.search(rest):
        kind = "table"
    elif found := _ROUTER.search(rest):
        if found["what"] == "weight":
            kind = "router"
        elif found["what"] == "bias":
            kind = "selection_bias" if model_type in BIAS_IS_FOR_CHOOSING else "router_bias"
    elif re.fullmatch(r"(mlp|block_sparse_moe)\.bias", rest):
        kind = "output_bias"
    return TensorName(name, stack, layer, kind, block) if kind else None
