"""``ablate``: perplexity, massive activations and attention sinks with experts switched off, beside controls.

Source: "Unveiling super experts in mixture-of-experts large language models" (arXiv 2507.23279), section 4 and its
published code: the second projection of an expert is set to zero, the router selects it as before, and its weight is
not handed to others. The controls are the paper's: as many experts from anywhere, and as many from the same layers. We
differ in that the loss is computed in float32 (the code does it in bfloat16), and in that controls never draw a chosen
expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from moescope.errors import InputError, RunError
from profiler import evaluate
from profiler.ablation.experts import Expert, random_experts, same_layer_experts
from profiler.ablation.outliers import OutlierMeter, Outliers
from profiler.ablation.switch import routed_experts, switched_off
from profiler.capture.discovery import inspect_model
from profiler.metrics.perplexity import Estimate

if TYPE_CHECKING:
    from profiler.corpus import TokenBatch

ControlName = Literal["random", "same layers"]
CONTROLS: dict[ControlName, Callable[..., list[Expert]]] = {
    "random": random_experts,
    "same layers": same_layer_experts,
}


@dataclass(frozen=True)
class Pass:
    """One reading of the text.

    Attributes:
        name: base | ablated | random | same layers.
        seed: of a control, else 0.
        experts: those that were switched off.
        perplexity: what came of it.
        ratio: perplexity over that of the base, with the interval of the pairs.
        outliers: residual stream and attention sinks.
    """

    name: str
    seed: int
    experts: list[Expert]
    perplexity: evaluate.Perplexity
    ratio: Estimate
    outliers: Outliers


@dataclass(frozen=True)
class Ablation:
    """What switching experts off does.

    Attributes:
        experts: the chosen ones.
        base: the model as it is.
        ablated: without the chosen experts.
        controls: without others, in the order of :data:`CONTROLS`.
        notes: what weakens the verdict, in sentences.
    """

    experts: list[Expert]
    base: Pass
    ablated: Pass
    controls: list[Pass]
    notes: list[str]


Progress = Callable[[int, int, str, int], None]
"""``progress(pass, passes, name, tokens)``: which pass is running, and how many tokens it has read."""


def ablate(
    model: nn.Module,
    batches: Callable[[], Iterable[TokenBatch]],
    *,
    experts: Sequence[Expert],
    controls: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Ablation:
    """Switch experts off and measure what the model loses. The model is afterwards as it was, whatever happens.

    Args:
        model: a model with a language-model head.
        batches: gives the held-out text anew for each pass.
        experts: which to switch off.
        controls: how many controls of each kind.
        seed: of the first control; the others follow.
        progress: told how far it is.

    Raises:
        InputError: no expert, or one that the model has not.
        ModelError: no MoE layer, no language-model head, or weights that are packed or not in memory.
        CorpusError: there is nothing to predict.
        RunError: out of memory, or losses that are no numbers.
    """
    if not experts:
        raise InputError("no expert to switch off: name some, such as 1:68,2:92")
    found = inspect_model(model)
    with switched_off(found.layers, experts):
        pass  # what cannot be switched off is refused before the first pass
    drawn, notes = _draw(list(experts), routed_experts(found.layers), controls, seed)
    passes = len(drawn) + 2
    meter = OutlierMeter(model, found)

    def read(number: int, name: str, control_seed: int, chosen: list[Expert]) -> Pass:
        def tell(tokens: int) -> None:
            if progress is not None:
                progress(number, passes, name, tokens)

        try:
            with meter.watching(), switched_off(found.layers, chosen):
                result = evaluate.perplexity(model, batches(), progress=tell)
        except torch.OutOfMemoryError as error:
            raise RunError("out of memory while reading the text: use a smaller --batch-size") from error
        ratio = evaluate.ratio(result, base.perplexity) if base is not None else Estimate(1.0, 1.0, 1.0)
        return Pass(name, control_seed, chosen, result, ratio, meter.result())

    base: Pass | None = None
    base = read(1, "base", 0, [])
    ablated = read(2, "ablated", 0, list(experts))
    others = [read(number, *control) for number, control in enumerate(drawn, start=3)]
    return Ablation(list(experts), base, ablated, others, notes)


def _draw(
    experts: list[Expert], available: list[Expert], controls: int, seed: int
) -> tuple[list[tuple[str, int, list[Expert]]], list[str]]:
    """(name, seed, experts) of every control, and what could not be drawn."""
    drawn: list[tuple[str, int, list[Expert]]] = []
    notes = []
    for name, draw in CONTROLS.items():
        found = [(name, seed + number, draw(experts, available, seed=seed + number)) for number in range(controls)]
        if found and not found[0][2]:
            notes.append(f"There are not enough other experts for the control {name!r}.")
            continue
        drawn += found
    if any(expert.kind == "shared" for expert in experts):
        notes.append("Shared experts see every token, the routed experts of the controls see few: weigh that.")
    return drawn, notes
