"""Models whose experts stay packed, on a machine without the kernels: these are written in plain torch instead.

The modules, their dispatch and the bytes are the library's; only the products of packed weights are computed here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.profiler.capture.tiny import build

BLOCK = 16


def fp8(patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A Qwen3-MoE model with FP8 experts and linear layers, and the same one dequantized."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations import finegrained_fp8

    plain, model = build("qwen3_moe"), build("qwen3_moe")
    declared = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK))
    finegrained_fp8.replace_with_fp8_linear(
        model, modules_to_not_convert=["lm_head", "gate"], quantization_config=declared, pre_quantized=True
    )
    stored = {}
    for name, target in plain.state_dict().items():
        stored[name] = target.clone()
        if model.get_parameter(name).dtype == torch.float8_e4m3fn:
            blocks = target.unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
            scales = blocks.abs().amax((-3, -1)).clamp_min(1e-9) / 448
            packed = (blocks / scales[..., :, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = packed.flatten(-2).flatten(-3, -2), scales
            target.copy_(_plain_fp8(stored[name], scales))
    model.load_state_dict(stored, assign=True)
    model.config.quantization_config = declared

    def matmul(x: Tensor, weight: Tensor, scales: Tensor, *_: Any, **__: Any) -> Tensor:
        return x @ _plain_fp8(weight, scales).to(x.dtype).T

    def batched(x: Tensor, weight: Tensor, scales: Tensor, *, expert_ids: Tensor, **_: Any) -> Tensor:
        return torch.einsum("sh,soh->so", x, _plain_fp8(weight, scales)[expert_ids].to(x.dtype))

    def grouped(x: Tensor, weight: Tensor, scales: Tensor, *, tokens_per_expert: Tensor, **_: Any) -> Tensor:
        expert = torch.arange(len(weight)).repeat_interleave(tokens_per_expert.long())
        return batched(x, weight, scales, expert_ids=expert)

    kernel = SimpleNamespace(matmul=matmul, batched_matmul=batched, grouped_matmul=grouped)
    patch.setattr(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: kernel)
    return model, plain


def _plain_fp8(weight: Tensor, scales: Tensor) -> Tensor:
    return weight.float() * scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)


def gguf(patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A Qwen3-MoE model whose experts are Q8_0 blocks, and the same one dequantized."""
    from gguf import GGMLQuantizationType, quants
    from transformers import GgufConfig
    from transformers.integrations.gguf import kernels
    from transformers.integrations.gguf.dequant import GGML_Q8_0, dequantize
    from transformers.integrations.gguf.utils import GgufExperts

    plain, model = build("qwen3_moe"), build("qwen3_moe")
    for layer, twin in zip(model.model.layers, plain.model.layers, strict=True):
        experts = twin.mlp.experts
        hidden, width = experts.down_proj.shape[1:]
        packed = GgufExperts(experts.num_experts, hidden, width, GGML_Q8_0, GGML_Q8_0, experts.act_fn)
        for name in ("gate_up_proj", "down_proj"):
            values = getattr(experts, name)
            blocks = quants.quantize(values.detach().numpy(), GGMLQuantizationType.Q8_0)
            getattr(packed, name).data = torch.from_numpy(np.copy(blocks))
            back = quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
            values.data = torch.from_numpy(np.copy(back))
        layer.mlp.experts = packed
    model.config.quantization_config = GgufConfig()

    def mul_mat_id(blocks: Tensor, x: Tensor, ids: Tensor, kind: int, out: int) -> Tensor:
        weight = dequantize(blocks, kind, x.dtype).reshape(blocks.shape[0], out, x.shape[-1])
        return torch.einsum("th,tkoh->tko", x, weight[ids.long()])

    patch.setattr(kernels, "_gguf_kernel", SimpleNamespace(mul_mat_id=mul_mat_id))
    return model, plain


class Routing(NamedTuple):
    """``RoutingData`` of triton_kernels."""

    gate_scal: Tensor
    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int
    expt_data: Any = None


class Indices(NamedTuple):
    """``GatherIndx`` and ``ScatterIndx``."""

    src_indx: Tensor
    dst_indx: Tensor


class Activation(NamedTuple):
    """``FusedActivation``."""

    specs: Any
    arguments: tuple[float, float]
    reduction: int


def mxfp4(patch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """GPT-OSS with the MXFP4 block, which routes in a kernel and calls its experts past ``forward``; and a plain twin.

    The weights are those of the twin: what is packed is out of sight of everything but the kernel.
    """
    from transformers import Mxfp4Config
    from transformers.integrations import mxfp4 as library

    plain, model = (build("gpt_oss", hidden_size=64, intermediate_size=32) for _ in range(2))
    for layer, twin in zip(model.model.layers, plain.model.layers, strict=True):
        experts = library.Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj"):
            del experts._parameters[name]  # as the loader does
            setattr(experts, name, _Packed(getattr(twin.mlp.experts, name).detach()))
            getattr(experts, f"{name}_bias").data = getattr(twin.mlp.experts, f"{name}_bias").detach()
        layer.mlp = library.Mxfp4GptOssMLP(layer.mlp.router, experts)
    model.config.quantization_config = Mxfp4Config()
    hub = SimpleNamespace(
        routing=SimpleNamespace(
            GatherIndx=Indices,
            ScatterIndx=Indices,
            RoutingData=Routing,
            compute_expt_data_torch=lambda *_: None,
            routing=lambda logits, k: _route(library, logits, k),
        ),
        matmul_ogs=SimpleNamespace(FnSpecs=lambda *names: names, FusedActivation=Activation, matmul_ogs=_matmul_ogs),
        swiglu=SimpleNamespace(swiglu_fn=None),
    )
    patch.setattr(library, "triton_kernels_hub", hub, raising=False)
    histc = torch.histc  # the library counts integers, which only a GPU can
    patch.setattr(torch, "histc", lambda values, **options: histc(values.float(), **options))
    return model, plain


class _Packed:
    """A tensor of triton_kernels: no parameter, and nothing that torch could read."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _route(library: Any, logits: Tensor, k: int) -> Any:
    scores, ids = logits.topk(k, dim=-1)
    return library.routing_from_top_k(ids, scores.softmax(-1), logits.shape[-1])


def _matmul_ogs(
    x: Tensor,
    weight: _Packed,
    bias: Tensor,
    routing: Routing,
    *,
    gather_indx: Indices | None = None,
    scatter_indx: Indices | None = None,
    precision_config: Any = None,
    gammas: Tensor | None = None,
    fused_activation: Activation | None = None,
) -> Tensor:
    if gather_indx is not None:
        x = x[gather_indx.src_indx.long() // routing.n_expts_act]
    expert = torch.arange(routing.n_expts_tot).repeat_interleave(routing.expt_hist.long())
    out = torch.einsum("ri,rio->ro", x, weight.values[expert]) + bias[expert]
    if fused_activation is not None:
        alpha, limit = fused_activation.arguments
        gate, up = out[:, ::2].clamp(max=limit), out[:, 1::2].clamp(-limit, limit)
        out = (up + 1) * gate * torch.sigmoid(alpha * gate)
    if gammas is not None:
        out = out * gammas[:, None]
    if scatter_indx is not None:
        out = torch.zeros_like(out).index_copy_(0, scatter_indx.dst_indx.long(), out)
        out = out.view(-1, routing.n_expts_act, out.shape[-1]).sum(1)
    return out


BUILDERS = {"FP8Experts": fp8, "GgufExperts": gguf, "Mxfp4GptOssExperts": mxfp4}


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The experts modules of a model."""
    return [module for name, module in model.named_modules() if name.endswith(".experts")]
