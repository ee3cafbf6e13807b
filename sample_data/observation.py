"""What the model does on held-out sequences, seen through hooks on the stock modules: sums and maxima per layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OlmoeForCausalLM


class Observation:
    """Sums over all observed tokens; layers L, experts E, domains D.

    - counts (D, L, E): selections of each expert, the BOS token left out;
    - output_maximum (L, E): largest |down_proj output| of each expert, before the gate weight;
    - hidden_maximum (L,), with its position and channel, and hidden_median (L,) of |residual stream| after each layer,
      the median as a mean over sequences;
    - sink (L,): attention mass on position 0, a mean over sequences, heads and the queries from position 1 on;
    - even_mass: what that mass would be if every query attended evenly;
    - losses per domain: -ln p of every token after BOS.
    """

    def __init__(self, *, model: OlmoeForCausalLM, domains: int) -> None:
        layers, experts = model.config.num_hidden_layers, model.config.num_experts
        self.model, self.domain = model, 0
        self.counts = torch.zeros(domains, layers, experts)
        self.output_maximum = torch.zeros(layers, experts)
        self.hidden_maximum, self.hidden_median = torch.zeros(layers), torch.zeros(layers)
        self.hidden_place = [(0, 0)] * layers
        self.sink, self.even_mass, self.sequences = torch.zeros(layers), 0.0, 0
        self.losses: list[list[Tensor]] = [[] for _ in range(domains)]

    def experts_hook(self, layer: int) -> Any:
        """Return a hook for an experts module, called with (hidden, indices, weights)."""

        def hook(module: Any, arguments: tuple[Tensor, ...]) -> None:
            hidden, indices = arguments[0], arguments[1]
            self.counts[self.domain, layer] += torch.bincount(indices[1:].flatten(), minlength=module.num_experts)
            for expert in sorted(set(indices.flatten().tolist())):
                rows = hidden[(indices == expert).any(dim=1)]
                gate, up = nn.functional.linear(rows, module.gate_up_proj[expert]).chunk(2, dim=-1)
                output = nn.functional.linear(module.act_fn(gate) * up, module.down_proj[expert])
                self.output_maximum[layer, expert] = max(self.output_maximum[layer, expert], output.abs().max())

        return hook

    def layer_hook(self, layer: int) -> Any:
        """Return a hook for a decoder layer's output."""

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            size = output[0].abs()
            self.hidden_median[layer] += size.median()
            if size.max() > self.hidden_maximum[layer]:
                self.hidden_maximum[layer] = size.max()
                self.hidden_place[layer] = divmod(int(size.argmax()), size.shape[1])

        return hook

    def add(self, ids: Tensor, *, domain: int) -> None:
        """Run one sequence, (tokens,), that begins with BOS."""
        self.domain = domain
        output = self.model(input_ids=ids[None], output_attentions=True, use_cache=False)
        losses = nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[1:], reduction="none")
        self.losses[domain].append(losses)
        self.sink += torch.stack([attention[0, :, 1:, 0].mean() for attention in output.attentions])
        self.even_mass += float((1 / torch.arange(2, len(ids) + 1)).mean())
        self.sequences += 1


@torch.no_grad()
def observe(*, model: OlmoeForCausalLM, sequences: Iterable[tuple[int, Tensor]], domains: int) -> Observation:
    """Run (domain, ids) sequences one by one; the model must use eager attention, which alone returns its weights."""
    observation = Observation(model=model, domains=domains)
    handles = []
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.mlp.experts.register_forward_pre_hook(observation.experts_hook(index)))
        handles.append(layer.register_forward_hook(observation.layer_hook(index)))
    try:
        for domain, ids in sequences:
            observation.add(ids, domain=domain)
    finally:
        for handle in handles:
            handle.remove()
    observation.sink /= observation.sequences
    observation.even_mass /= observation.sequences
    observation.hidden_median /= observation.sequences
    return observation
