"""What the projections of experts are called in a loaded model whose experts are modules of their own.

Engines that quantize take the fused experts of transformers apart (AutoRound, llm-compressor and GPTQModel give the
parts the same names) and find widths by the names of the parts. On disk the same weights may be called otherwise:
Mixtral's ``block_sparse_moe.experts.3.w1`` is ``mlp.experts.3.gate_proj`` in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moescope.errors import PlanError


@dataclass(frozen=True)
class ModuleNames:
    """Paths of a family's modules.

    Attributes:
        block: path in the decoder layer of the module around the experts.
        shared: path in the decoder layer of the shared experts; empty where the family has none or fuses them.
        router: path in the decoder layer of the router.
        layers: path of the list of decoder layers.
    """

    block: str = "mlp"
    shared: str = ""
    router: str = "mlp.gate"
    layers: str = "model.layers"

    def expert(self, layer: int, expert: int, part: str) -> str:
        """The name of one projection (``gate``, ``up``, ``down``) of a routed expert."""
        return f"{self.layers}.{layer}.{self.block}.experts.{expert}.{part}_proj"

    def shared_expert(self, layer: int, part: str) -> str:
        """The name of one projection of the shared experts; empty where they have none."""
        return f"{self.layers}.{layer}.{self.shared}.{part}_proj" if self.shared else ""


_PLAIN = ModuleNames()
_SHARED = ModuleNames(shared="mlp.shared_experts")
_ONE_SHARED = ModuleNames(shared="mlp.shared_expert")

MODULE_NAMES: dict[str, ModuleNames] = {
    **dict.fromkeys(("olmoe", "flex_olmo", "qwen3_moe", "mixtral", "minimax_m2", "mimo_v2_flash", "mellum"), _PLAIN),
    **dict.fromkeys(("gpt_oss", "phimoe"), ModuleNames(router="mlp.router")),
    **dict.fromkeys(("qwen2_moe", "qwen3_next"), _ONE_SHARED),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "dots1",
         "ernie4_5_moe", "exaone_moe", "hy_v3", "kimi_linear", "solar_open", "bailing_hybrid"),
        _SHARED,
    ),
    "hunyuan_v1_moe": ModuleNames(shared="mlp.shared_mlp"),
    **dict.fromkeys(
        ("granitemoe", "granitemoehybrid", "granitemoeshared"),
        ModuleNames(block="block_sparse_moe", router="block_sparse_moe.router"),
    ),
    "jamba": ModuleNames(block="feed_forward", router="feed_forward.router"),
    "lfm2_moe": ModuleNames(block="feed_forward", router="feed_forward.gate"),
    "nemotron_h": ModuleNames(block="mixer", shared="mixer.shared_experts", router="mixer.gate"),
}  # fmt: skip
"""By ``model_type``. Families that stand in another model (vision and language) have another path, and are left out."""

GGUF_PARTS = {"gate": "ffn_gate_{}", "up": "ffn_up_{}", "down": "ffn_down_{}"}
"""What llama.cpp calls the projections: of all experts of a layer in one tensor, whatever the family."""

GGUF_KINDS: dict[Literal["routed", "shared"], str] = {"routed": "exps", "shared": "shexp"}


def module_names(model_type: str) -> ModuleNames:
    """The names of a family.

    Raises:
        PlanError: they are not known.
    """
    if model_type not in MODULE_NAMES:
        raise PlanError(
            f"the names of {model_type}'s experts in a loaded model are not known: exports are for"
            f" {', '.join(sorted(MODULE_NAMES))} (compressor/families/module_names.py)"
        )
    return MODULE_NAMES[model_type]
