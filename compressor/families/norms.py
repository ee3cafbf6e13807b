"""Which norm puts out what enters the experts, for families in which nothing but the MoE block reads it.

The experts, the router and the shared experts then read the same channels, and what a channel is multiplied by in the
norm can be taken back in their weights. Families that are not named add what the norm puts out to the residual stream
(MiniMax), give it to attention too (Cohere 2), normalise outputs instead (FlexOlmo), or have their router or their
experts read another state (Gemma 4, Nemotron-H, Zaya). Each family was tried on a tiny model with scales at random.
"""

from __future__ import annotations

_POST_ATTENTION = (
    *("aria_text", "axk1", "bailing_hybrid", "deepseek_ocr2_text", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    *("deepseek_v4", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite"),
    *("glm4v_moe_text", "glm5_next_text", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa"),
    *("granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text"),
    *("jetmoe", "kimi_linear", "kolibri1", "laguna", "llama4_text", "mellum", "mimo_v2_flash", "minimax_m2"),
    *("minimax_m3_vl_text", "mistral4", "mistral_large4_text", "mixtral", "olmoe", "openai_privacy_filter", "phimoe"),
    *("qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe_text", "qwen3_vl_moe_text"),
    *("solar_open", "step3p5", "unlimited_ocr_text"),
)

BLOCK_NORMS: dict[str, str] = {
    **dict.fromkeys(_POST_ATTENTION, "post_attention_layernorm"),
    "afmoe": "pre_mlp_layernorm",
    "dbrx": "norm_attn_norm.norm_2",
    "jamba": "pre_ff_layernorm",
    "lfm2_moe": "ffn_norm",
}
"""Model type of the decoder's configuration -> path of the norm in its decoder layers."""


def block_norm(model_type: str) -> str | None:
    """Path of the norm before the MoE block in a decoder layer; None where none is known to serve it alone."""
    return BLOCK_NORMS.get(model_type)
