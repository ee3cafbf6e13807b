"""Experts that are modules of their own, in a list or a dictionary: ``experts[i].gate_proj`` and the like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from compressor.families.layout import ExpertsLayout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SeparateLayout(ExpertsLayout):
    """``up_name`` and ``down_name`` name the projections (``nn.Linear``) of one expert, not of the module of all.

    Attributes:
        expert_name: path of expert {} in the module.
        gate_name: the gate projection; empty without.
    """

    expert_name: str = "{}"
    gate_name: str = ""

    def expert(self, experts: Any, expert: int) -> Any:
        """The module of one expert."""
        # Not attrgetter: the names of a list's children are numbers.
        for name in self.expert_name.format(expert).split("."):
            experts = getattr(experts, name)
        return experts

    def up_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """(2 I or I, hidden) the first projection of one expert, gate and up one below the other."""
        import torch

        module = self.expert(experts, expert)
        up: torch.Tensor = attrgetter(self.up_name)(module).weight
        return torch.cat([attrgetter(self.gate_name)(module).weight, up]) if self.gated else up

    def first_projections(self, experts: Any, expert: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gate and up rows of one expert as they stand in their modules; None without gate."""
        module = self.expert(experts, expert)
        up: torch.Tensor = attrgetter(self.up_name)(module).weight
        return attrgetter(self.gate_name)(module).weight if self.gated else None, up

    def down_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """(hidden, I) the second projection of one expert."""
        weight: torch.Tensor = attrgetter(self.down_name)(self.expert(experts, expert)).weight
        return weight

    def bias(self, experts: Any, name: str, expert: int) -> torch.Tensor | None:
        """The bias that belongs to the projection ``name`` of one expert; None where the family has none."""
        import torch

        if not self.biased:
            return None
        module = self.expert(experts, expert)
        bias: torch.Tensor = attrgetter(name)(module).bias
        gated = self.gated and name == self.up_name
        return torch.cat([attrgetter(self.gate_name)(module).bias, bias]) if gated else bias

    def activate(self, experts: Any, first: torch.Tensor) -> torch.Tensor:
        """See :meth:`ExpertsLayout.activate`; all experts have the activation function of the first."""
        return super().activate(self.expert(experts, 0), first)


def separate_layout(
    up: str, down: str, gate: str = "", *, expert: str = "{}", count: str = "num_experts", activation: str = "act_fn"
) -> Callable[[Any], SeparateLayout]:
    """What reads the layout of experts that are modules of their own.

    Args:
        up: name of an expert's up projection, an ``nn.Linear``.
        down: of its down projection.
        gate: of its gate projection; empty without.
        expert: path of expert ``{}`` in the module that the adapter is for.
        count: attribute of that module that says how many experts there are.
        activation: name of an expert's activation function.
    """

    def read(module: Any) -> SeparateLayout:
        layout = SeparateLayout(
            num_experts=int(getattr(module, count)),
            hidden_size=0,
            width=0,
            gated=bool(gate),
            transposed=False,
            interleaved=False,
            biased=False,
            post_norm=False,
            up_name=up,
            down_name=down,
            activation_name=activation,
            expert_name=expert,
            gate_name=gate,
        )
        first = attrgetter(down)(layout.expert(module, 0))
        hidden, width = first.weight.shape
        return replace(layout, hidden_size=int(hidden), width=int(width), biased=first.bias is not None)

    return read
