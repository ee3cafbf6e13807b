"""Tiny random models of real families, and what they do, written down by plain hooks and computed in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from profiler.capture.discovery import MoELayer, find_moe_layers

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "reference" / "tiny-moe-configs.json").read_text(encoding="utf-8")
)
REFUSED = ("nllb-moe",)
CALLED_OTHERWISE = ("doge", "jetmoe", "llama4_text", "switch_transformers")
"""Families whose experts are not called with (hidden, ids, weights): ``test_adapters`` computes them by hand."""

WATCHED = tuple(family for family in CONFIGS if family not in (*REFUSED, *CALLED_OTHERWISE))
FAST = ("olmoe", "mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss")
"""Softmax, renormalised, shared with a gate, sigmoid with groups and bias, transposed and interleaved with biases."""

transformers.logging.set_verbosity_error()
# Tiny models run on one thread: starting others takes longer than the work, and much longer on a busy machine.
torch.set_num_threads(1)


def build(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with random weights, the same every time."""
    entry = CONFIGS[family]
    config = getattr(transformers, entry["config_class"]).from_dict({**entry["config"], **changes})
    torch.manual_seed(0)
    model = getattr(transformers, entry["model_class"])._from_config(config, dtype=dtype).eval()
    for module in model.modules():
        if type(module).__name__ == "Inkling2TopKRouter":
            module.float()  # it reads in float32; a model made in bfloat16 cannot run otherwise
    with torch.no_grad():
        for parameter in model.parameters():
            # Random initialisation is so small that gates are near zero and every layer looks alike.
            if parameter.ndim >= 2:
                parameter.mul_(3)
                if not parameter.any():  # routers that begin at zero would tie on everything
                    parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            # Biases that steer the selection, and nothing else, are zero in a new model.
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(std=0.1)
            elif name.endswith("tid2eid"):  # a table of token ids, which a new model leaves at expert 0
                buffer.copy_(torch.rand(len(buffer), config.n_routed_experts).topk(buffer.shape[1]).indices)
    return model


def batch(rows: int = 3, length: int = 12, *, padding: str = "right", seed: int = 1) -> dict[str, Tensor]:
    """Random token ids and a mask; row r has r * 3 tokens of padding on the given side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        if row and padding == "right":
            mask[row, -3 * row :] = 0
        elif row and padding == "left":
            mask[row, : 3 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Calls:
    """What one experts module was called with, in every forward."""

    layer: MoELayer
    hidden: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def rows(self, call: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(tokens, k, I) activations and (tokens, k, hidden) outputs of the selected experts, in float64."""
        experts, layout = self.layer.experts, self.layer.layout
        assert layout is not None
        double = _Double(experts)
        tokens, k = self.ids[call].shape
        activations = np.zeros((tokens, k, layout.width))
        outputs = np.zeros((tokens, k, layout.hidden_size))
        for token in range(tokens):
            for slot in range(k):
                expert = int(self.ids[call][token, slot])
                activation, output = layout.run_expert(double, expert, self.hidden[call][token : token + 1].double())
                activations[token, slot], outputs[token, slot] = activation[0].numpy(), output[0].numpy()
        return activations, outputs


class _Double:
    """An experts module whose weights read as float64."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
            return _Double(value)
        return value.detach().double() if isinstance(value, Tensor) else value

    def __call__(self, *args: Tensor) -> Any:
        return type(self._module).forward(self, *args)  # type: ignore[arg-type]


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[Calls]]:
    """While entered, plain hooks on the experts and routers write down their arguments."""
    calls = [Calls(layer) for layer in find_moe_layers(model)]
    handles = []

    def hook(entry: Calls) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids, weights = (*args, *kwargs.values())[:3]
            entry.hidden.append(hidden.detach().reshape(-1, hidden.shape[-1]).clone())
            entry.ids.append(ids.detach().clone())
            entry.weights.append(weights.detach().clone())

        return see

    def router_hook(entry: Calls) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            logits = output if isinstance(output, Tensor) else output[entry.layer.logits_index]
            entry.logits.append(logits.detach().reshape(-1, logits.shape[-1]).clone())

        return see

    try:
        for entry in calls:
            handles.append(entry.layer.experts.register_forward_pre_hook(hook(entry), with_kwargs=True))
            if entry.layer.router is not None:
                handles.append(entry.layer.router.register_forward_hook(router_hook(entry)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_of(result: Any) -> Tensor:
    """The logits of a model's output, or its hidden state."""
    return getattr(result, "logits", None) if getattr(result, "logits", None) is not None else result[0]


def tokenizer(size: int = 120) -> Any:
    """A byte-level tokenizer with few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = ["\u0120", "\u010a", *[letter for letter in letters if letter.isascii()]]
    vocabulary = {piece: place for place, piece in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters][:size])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
