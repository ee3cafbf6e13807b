"""The published ways of getting what the profiler records, written from their descriptions, as baselines.

Three of them, on a random OLMoE:

- ``observe_all_experts`` (REAP): a hook on each MoE block runs all experts on all tokens into a float32 buffer, and
  chooses anew from the softmax of the logits.
- ``hook_down_projections`` (super experts): hooks on each expert's own down projection, which needs a copy of the model
  whose experts are separate modules; four reductions are brought to the host per expert and forward.
- ``two_passes`` (HEAPr): a forward and backward that gathers the (hidden, hidden) matrix of output gradients per
  expert, and a second forward for the squared activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def tiny_olmoe(*, layers: int = 8, width: int = 256, experts: int = 32, top_k: int = 4, dtype: torch.dtype) -> Any:
    """A random OLMoE; E / k is 8 as it stands."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = OlmoeForCausalLM._from_config(config, dtype=dtype).eval()
    return model.requires_grad_(False)


class SeparateExperts(nn.Module):
    """The experts of one layer as separate modules, called one after the other."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            self.experts.append(_Expert(*gate_up.chunk(2), down))

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """(tokens, hidden) the weighted sum of the selected experts."""
        total = torch.zeros_like(hidden)
        for place, expert in enumerate(self.experts):
            token, slot = torch.where(ids == place)
            # Experts without a token are called all the same, as the hooks of the published code expect.
            total = total.index_add(0, token, expert(hidden[token]) * weights[token, slot, None].to(hidden.dtype))
        return total


class _Expert(nn.Module):
    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
            setattr(self, name, linear)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(inputs)) * self.up_proj(inputs))
        return output


def with_separate_experts(model: Any) -> Any:
    """A copy of the model whose experts are separate modules."""
    unfused = copy.deepcopy(model)
    for layer in unfused.model.layers:
        layer.mlp.experts = SeparateExperts(layer.mlp.experts)
    return unfused


def observe_all_experts(model: Any) -> tuple[list[dict[str, Tensor]], Callable[[], None]]:
    """Hook every block as REAP's observer does; the sums, and what takes the hooks off."""
    sums: list[dict[str, Tensor]] = []
    handles = []
    for layer in model.model.layers:
        state: dict[str, Tensor] = {}
        sums.append(state)
        handles.append(layer.mlp.register_forward_hook(_all_experts_hook(state)))
    return sums, lambda: [handle.remove() for handle in handles] and None


def _all_experts_hook(state: dict[str, Tensor]) -> Callable[..., None]:
    @torch.no_grad()
    def see(block: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        experts, top_k = block.experts.num_experts, block.gate.top_k
        buffer = torch.zeros(experts, len(hidden), hidden.shape[-1])  # shape: (E, T, d), float32
        for place in range(experts):
            gate, up = (hidden @ block.experts.gate_up_proj[place].T).chunk(2, -1)
            buffer[place] = (nn.functional.silu(gate) * up) @ block.experts.down_proj[place].T
        logits = (hidden @ block.gate.weight.T).float()
        probability = logits.softmax(-1)
        chosen = probability.topk(top_k, -1).indices
        for place in range(experts):
            active = (chosen == place).any(-1)
            norm = buffer[place, active].norm(dim=-1)
            gates = probability[active, place]
            new = {
                "frequency": active.sum(),
                "norm": norm.sum(),
                "gated_norm": (gates * norm).sum(),
                "gate": gates.sum(),
                "largest": buffer[place, active].max() if bool(active.any()) else torch.tensor(0.0),
            }
            for name, value in new.items():
                row = state.setdefault(name, torch.zeros(experts))
                row[place] = torch.maximum(row[place], value) if name == "largest" else row[place] + value

    return see


def hook_down_projections(unfused: Any) -> tuple[dict[str, list[float]], Callable[[], None]]:
    """Hook every expert's own down projection, as the profiler of super experts does."""
    found: dict[str, list[float]] = {}
    handles = []
    for name, module in unfused.named_modules():
        if name.endswith("down_proj"):
            rows = found.setdefault(name, [])
            handles.append(module.register_forward_hook(_outlier_hook(rows)))
    return found, lambda: [handle.remove() for handle in handles] and None


def _outlier_hook(rows: list[float]) -> Callable[..., None]:
    @torch.no_grad()
    def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        entering, leaving = args[0], output
        if not leaving.numel():
            rows.extend([0.0, 0.0, 0.0, 0.0])
            return
        rows.append(float(entering.abs().max()))
        rows.append(float(entering.abs().argmax()))
        rows.append(float(leaving.abs().max()))
        rows.append(float(leaving.abs().argmax() % leaving.shape[-1]))

    return see


def two_passes(unfused: Any, ids: Tensor) -> dict[str, Tensor]:
    """(experts,) lists of neuron scores mean(a^2) w^T M w by a forward, a backward, and a second forward."""
    downs = {name: module for name, module in unfused.named_modules() if name.endswith("down_proj")}
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def gather(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            def take(gradient: Tensor) -> None:
                rows = gradient.float()
                moments[name] = moments.get(name, 0) + rows.T @ rows
                counts[name] = counts.get(name, 0) + len(rows)

            if output.requires_grad:
                output.register_hook(take)

        return see

    handles = [module.register_forward_hook(gather(name)) for name, module in downs.items()]
    loss_of(unfused, ids).backward()
    for handle in handles:
        handle.remove()

    squares: dict[str, Tensor] = {}

    def energy(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            squares[name] = squares.get(name, 0) + args[0].float().square().sum(0)

        return see

    handles = [module.register_forward_hook(energy(name)) for name, module in downs.items()]
    with torch.no_grad():
        unfused(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    scores = {}
    for name, module in downs.items():
        weight, count = module.weight.float(), max(1, counts.get(name, 0))
        moment = moments.get(name, torch.zeros(weight.shape[0], weight.shape[0])) / count
        scores[name] = squares[name] / count * (weight * (moment @ weight)).sum(0)
    return scores


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Mean next-token loss, with a graph that begins at the embeddings: no gradient of a weight is computed."""
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))
