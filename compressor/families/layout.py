"""How an experts module keeps its weights; of a fused one of transformers 5, by the attributes stamped on it.

The library decorates 65 experts classes of 64 families alike: ``experts(hidden, ids, weights)`` with all experts in 3-D
parameters. They differ in four switches (gated, transposed, interleaved, biased), which every instance carries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

ExpertKind = Literal["routed", "zero", "copy", "constant"]
"""What an expert is: one with weights; one that puts out nothing, its input, or a value of its own."""


@dataclass(frozen=True)
class ExpertsLayout:
    """Names and orientation of the parameters of one experts module; families that keep them otherwise subclass it.

    Attributes:
        num_experts: E, experts that can be selected.
        hidden_size: width of what enters and leaves the experts (a latent width in Nemotron-H and Muse-Spark).
        width: neurons per expert, I.
        gated: the first projection holds gate and up together (2 I rows), else only up (I rows).
        transposed: tensors are (E, in, out) instead of (E, out, in).
        interleaved: gate and up alternate (gate 0, up 0, gate 1, ...) instead of standing one after the other.
        biased: both projections have biases, named like their weights with ``_bias`` behind.
        post_norm: the module normalises each expert's output before it is weighted.
        up_name: ``gate_up_proj`` or, without gate, ``up_proj``; dots lead into submodules.
        down_name: ``down_proj``.
        activation_name: the activation function, where the module has no ``_apply_gate`` of its own.
        weightless: the kinds of the last experts, which have no weights; empty where all experts are routed ones.
    """

    num_experts: int
    hidden_size: int
    width: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    post_norm: bool
    up_name: str
    down_name: str = "down_proj"
    activation_name: str = "act_fn"
    weightless: tuple[ExpertKind, ...] = ()

    def up_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """The first projection of one expert as (2 I or I, hidden), whatever the orientation in the module."""
        weight: torch.Tensor = attrgetter(self.up_name)(experts)[expert]
        return weight.T if self.transposed else weight

    def down_weight(self, experts: Any, expert: int) -> torch.Tensor:
        """The second projection of one expert as (hidden, I), whatever the orientation in the module."""
        weight: torch.Tensor = attrgetter(self.down_name)(experts)[expert]
        return weight.T if self.transposed else weight

    @property
    def num_weighted(self) -> int:
        """Experts that have weights: all, unless some only copy their input or put out nothing."""
        return self.num_experts - len(self.weightless)

    @property
    def kinds(self) -> tuple[ExpertKind, ...]:
        """What each of the E experts is."""
        kind: ExpertKind = "routed"
        return (kind,) * self.num_weighted + self.weightless

    def split_gate(self, first: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gate and up rows, each (I, hidden), of a first projection as :meth:`up_weight` gives it; None without."""
        if not self.gated:
            return None, first
        if self.interleaved:
            return first[::2], first[1::2]
        return first[: self.width], first[self.width :]

    def first_projections(self, experts: Any, expert: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gate and up rows of one expert, each (I, hidden), without a copy where that can be; None without gate."""
        return self.split_gate(self.up_weight(experts, expert))

    def bias(self, experts: Any, name: str, expert: int) -> torch.Tensor | None:
        """The bias that belongs to the projection ``name`` of one expert; None where the family has none."""
        return attrgetter(f"{name}_bias")(experts)[expert] if self.biased else None

    def run_expert(self, experts: Any, expert: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert on its own, by plain matrix products, in the type of ``inputs``.

        Args:
            inputs: (tokens, hidden_size), usually float32 whatever the weights' type.

        Returns:
            The activation that enters the second projection, (tokens, I), and the expert's output, (tokens,
            hidden_size), before its gate weight. It shares no code with the library's own dispatch except the
            activation function, which is what makes it a check of that dispatch. An expert without weights has an
            activation of zeros.

        Raises:
            NotImplementedError: the expert is a constant, which only the family's own layout can know.
        """
        if expert >= self.num_weighted:
            return inputs.new_zeros(len(inputs), self.width), self._run_weightless(expert, inputs)
        first = _linear(inputs, self.up_weight(experts, expert), self.bias(experts, self.up_name, expert))
        activation = self.activate(experts, first)
        output = _linear(activation, self.down_weight(experts, expert), self.bias(experts, self.down_name, expert))
        return activation, experts.post_expert_norm(output) if self.post_norm else output

    def activate(self, experts: Any, first: torch.Tensor) -> torch.Tensor:
        """(tokens, I) what enters the second projection, from (tokens, 2 I or I) what the first one puts out."""
        if self.gated and hasattr(experts, "_apply_gate"):
            gated: torch.Tensor = experts._apply_gate(first)
            return gated
        gate, up = self.split_gate(first.T)
        active = attrgetter(self.activation_name)(experts)
        inner: torch.Tensor = active(up) if gate is None else active(gate) * up
        return inner.T

    def _run_weightless(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        kind = self.kinds[expert]
        if kind == "copy":
            return inputs
        if kind == "zero":
            return inputs.new_zeros(len(inputs), self.hidden_size)
        raise NotImplementedError(f"expert {expert} is a {kind} one: its family's layout has to override run_expert")


def is_fused_experts(module: Any) -> bool:
    """Whether a module follows the library's fused-experts contract, by the attributes which that contract stamps."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "_apply_gate"))


def describe_experts(module: Any) -> ExpertsLayout | None:
    """The layout of a fused experts module; None where its weights are packed otherwise (FP8, GGUF, ...).

    A module without layout can still be watched at level routing, where nothing inside it is looked at. Modules outside
    the library's interface are described by their adapters instead.
    """
    if not is_fused_experts(module):
        return None
    gated, transposed = bool(module.has_gate), bool(module.is_transposed)
    up_name = "gate_up_proj" if gated else "up_proj"
    up: Any = getattr(module, up_name, None)
    down: Any = getattr(module, "down_proj", None)
    plain = all(getattr(tensor, "ndim", 0) == 3 and tensor.is_floating_point() for tensor in (up, down))
    if not plain or down.element_size() < 2:
        return None
    experts, first, second = down.shape
    return ExpertsLayout(
        num_experts=int(experts),
        hidden_size=int(second if transposed else first),
        width=int(first if transposed else second),
        gated=gated,
        transposed=transposed,
        interleaved=not getattr(module, "is_concatenated", True),
        biased=bool(getattr(module, "has_bias", False)),
        post_norm=bool(getattr(module, "has_post_expert_norm", False)),
        up_name=up_name,
    )


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = inputs @ weight.to(inputs.dtype).T
    return product if bias is None else product + bias.to(inputs.dtype)


def stacked_layout(
    up: str,
    down: str = "down_proj",
    *,
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    activation: str = "act_fn",
) -> Callable[[Any], ExpertsLayout]:
    """What reads the layout of experts whose weights stand in two 3-D tensors: the shapes say the rest.

    Args:
        up: name of the first projection, (E, 2 I or I, hidden); dots lead into submodules.
        down: name of the second, (E, hidden, I).
        gated: the first holds gate and up, else only up.
        transposed: both are (E, in, out) instead.
        interleaved: gate and up alternate.
        activation: name of the activation function; a method ``_apply_gate``, (rows, 2 I) -> (rows, I), goes before.
    """

    def read(module: Any) -> ExpertsLayout:
        experts, first, second = attrgetter(down)(module).shape
        return ExpertsLayout(
            num_experts=int(experts),
            hidden_size=int(second if transposed else first),
            width=int(first if transposed else second),
            gated=gated,
            transposed=transposed,
            interleaved=interleaved,
            biased=False,
            post_norm=False,
            up_name=up,
            down_name=down,
            activation_name=activation,
        )

    return read
