"""DBRX: gate, up and down of all experts stand one below the other in 2-D, each (E x I, hidden)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.families.layout import ExpertsLayout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DbrxLayout(ExpertsLayout):
    """``mlp.w1`` (gate), ``mlp.v1`` (up) and ``mlp.w2`` (down), packed."""

    def _part(self, experts: Any, name: str, expert: int) -> torch.Tensor:
        packed: torch.Tensor = getattr(experts.mlp, name)
        return packed.view(self.num_experts, self.width, self.hidden_size)[expert]

    def up_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """(2 I, hidden) gate and up of one expert, one below the other."""
        import torch

        return torch.cat([self._part(experts, "w1", expert), self._part(experts, "v1", expert)])

    def first_projections(self, experts: Any, expert: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gate and up rows of one expert, which are views."""
        return self._part(experts, "w1", expert), self._part(experts, "v1", expert)

    def down_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """(hidden, I) the second projection of one expert."""
        return self._part(experts, "w2", expert).T

    def run_expert(self, experts: Any, expert: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert on its own; see :meth:`ExpertsLayout.run_expert`."""
        gate, up = (inputs @ self._part(experts, name, expert).to(inputs.dtype).T for name in ("w1", "v1"))
        activation = experts.mlp.activation_fn(gate) * up
        return activation, activation @ self._part(experts, "w2", expert).to(inputs.dtype)


def dbrx_layout(module: Any) -> DbrxLayout:
    """The layout of ``DbrxExperts``."""
    return DbrxLayout(
        num_experts=int(module.num_experts),
        hidden_size=int(module.hidden_size),
        width=int(module.ffn_hidden_size),
        gated=True,
        transposed=False,
        interleaved=False,
        biased=False,
        post_norm=False,
        up_name="mlp.w1",
        down_name="mlp.w2",
        activation_name="mlp.activation_fn",
    )
