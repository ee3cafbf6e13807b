"""Tiny quantized checkpoints, written byte by byte, with the weights that they mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.profiler.capture.tiny import build, tokenizer

Weights = dict[str, Tensor]

GGUF_CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
}
"""What the library reads of these files whatever they say."""

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(folder: Path, family: str = "qwen3_moe", *, block: int = 16, **changes: Any) -> Weights:
    """Block-scaled FP8 (DeepSeek-V3's format): e4m3 weights, one float32 scale per block. Returns the weights meant."""
    stored, meant = _plain(folder, family, changes), {}
    for name in [name for name, tensor in stored.items() if "proj" in name and tensor.ndim == 2]:
        rows, columns = stored[name].shape
        blocks = stored[name].float().view(rows // block, block, columns // block, block)
        scales = blocks.abs().amax((1, 3)).clamp_min(1e-9) / 448
        packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = packed.view(rows, columns)
        stored[f"{name}_scale_inv"] = scales
        meant[name] = (packed.float() * scales[:, None, :, None]).view(rows, columns)
    declared = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    _finish(folder, stored, declared)
    return meant


def mxfp4(folder: Path) -> Weights:
    """GPT-OSS's format: two e2m1 numbers per byte, one power of two per 32 of them. Returns the weights meant."""
    stored, meant = _plain(folder, "gpt_oss", {"hidden_size": 64, "intermediate_size": 32}), {}
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = stored.pop(name).float().transpose(1, 2)  # shape: (experts, out, in)
        groups = weight.unflatten(-1, (-1, 32))
        exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
        scaled = groups / torch.exp2(exponent)[..., None]
        code = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
        meant[name] = (E2M1[code] * scaled.sign() * torch.exp2(exponent)[..., None]).flatten(-2).transpose(1, 2)
        code = code | ((scaled < 0).long() << 3)
        stored[f"{name}_blocks"] = (code[..., ::2] | code[..., 1::2] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    _finish(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return meant


def compressed(folder: Path, widths: tuple[int, ...] = (4,), *, zero_points: bool = False) -> Weights:
    """compressed-tensors ``pack-quantized`` with groups of 16; expert e has width ``widths[e % len(widths)]``."""
    stored, meant = _plain(folder, "qwen3_moe", {}), {}
    for name in [name for name, tensor in stored.items() if "proj" in name and tensor.ndim == 2]:
        expert = re.search(r"experts\.(\d+)\.", name)
        bits = widths[int(expert[1]) % len(widths)] if expert else widths[0]
        weight, base = stored.pop(name), name.removesuffix(".weight")
        rows, columns = weight.shape
        groups = weight.float().view(rows, -1, 16)
        scale = (groups.abs().amax(-1).clamp_min(1e-9) / (2 ** (bits - 1) - 1)).bfloat16()
        whole = (groups / scale.float()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        meant[name] = (whole * scale.float()[..., None]).view(rows, columns)
        stored[f"{base}.weight_packed"] = _packed(whole.view(rows, columns), bits)
        stored[f"{base}.weight_scale"] = scale
        stored[f"{base}.weight_shape"] = torch.tensor(weight.shape)
        if zero_points:
            stored[f"{base}.weight_zero_point"] = torch.zeros(rows * bits // 32 + 1, columns // 16, dtype=torch.int32)
    schemes = {}
    for place, bits in enumerate(widths):
        experts = "|".join(str(expert) for expert in range(8) if expert % len(widths) == place)
        targets = [rf"re:.*experts\.({experts})\..*", *["re:.*self_attn.*"][place:]]
        scheme = {"num_bits": bits, "type": "int", "symmetric": not zero_points, "strategy": "group", "group_size": 16}
        schemes[f"group_{place}"] = {"targets": targets if len(widths) > 1 else ["Linear"], "weights": scheme}
    declared = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    _finish(folder, stored, {**declared, "config_groups": schemes, "ignore": ["lm_head", "re:.*mlp.gate$"]})
    return meant


def compressed_fp8(folder: Path) -> Weights:
    """compressed-tensors ``float-quantized``: e4m3 weights with one scale per row. Returns the weights meant."""
    stored, meant = _plain(folder, "qwen3_moe", {}), {}
    for name in [name for name, tensor in stored.items() if "proj" in name and tensor.ndim == 2]:
        weight = stored[name].float()
        scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
        stored[name] = (weight / scale.float()).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", ".weight_scale")] = scale
        meant[name] = stored[name].float() * scale.float()
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": inputs}}
    declared = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
    _finish(folder, stored, {**declared, "config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"]})
    return meant


def _packed(whole: Tensor, bits: int) -> Tensor:
    """(rows, columns * bits / 32) int32, the lowest bits first."""
    unsigned = (whole.long() + 2 ** (bits - 1)).view(whole.shape[0], -1, 32 // bits)
    words = (unsigned << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def gguf(file: Path, family: str = "qwen3_moe") -> Weights:
    """A Qwen MoE model as llama.cpp writes it: experts stacked per projection, all matrices in Q8_0 blocks."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    model = build(family, **GGUF_CHANGES[family])
    config, weights, meant = model.config, model.state_dict(), {}
    writer = GGUFWriter(file, family.replace("_", ""))
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if hasattr(config, "head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    pieces = [piece for piece, _ in sorted(tokenizer().get_vocab().items(), key=lambda entry: entry[1])]
    pieces += ["ab", *(f"<extra{number}>" for number in range(config.vocab_size - len(pieces) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(pieces)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * len(pieces))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, tensor: Tensor, source: str) -> None:
        values = tensor.detach().float().numpy()
        if values.ndim == 1 or source.endswith("gate.weight"):
            writer.add_tensor(name, values.reshape(-1) if source.endswith("shared_expert_gate.weight") else values)
            return
        blocks = quants.quantize(values, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        back = torch.from_numpy(np.copy(quants.dequantize(blocks, GGMLQuantizationType.Q8_0)))
        meant[source] = torch.cat([meant[source], back], 1) if source in meant else back

    for name, tensor in weights.items():
        if "experts.gate_up_proj" in name:
            block = f"blk.{name.split('.')[2]}"
            gate, up = tensor.chunk(2, dim=1)
            add(f"{block}.ffn_gate_exps.weight", gate, name)
            add(f"{block}.ffn_up_exps.weight", up, name)
        else:
            add(_gguf_name(name), tensor, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _gguf_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp"}
    parts |= {"mlp.experts.down_proj": "ffn_down_exps", "mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
    parts |= {f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
    end = "bias" if name.endswith(".bias") else "weight"
    base = name.removesuffix(f".{end}")
    if base in outside:
        return f"{outside[base]}.{end}"
    _, _, layer, rest = base.split(".", 3)
    return f"blk.{layer}.{parts[rest]}.{end}"


def _plain(folder: Path, family: str, changes: dict[str, Any]) -> Weights:
    build(family, dtype=torch.bfloat16, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _finish(folder: Path, stored: Weights, declared: dict[str, Any]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = declared
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
