"""Checkpoints of the training in safetensors: weights, optimizer and step, each written whole or not at all."""

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM


def save_checkpoint(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write weights and AdamW's state of each parameter under one name per tensor."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    """Load what `save_checkpoint` wrote and return the number of steps done."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            if optimizer is not None:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        return int(file.metadata()["step"])


def export(folder: Path, *, model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write an ordinary Hugging Face folder in bfloat16, replacing an older one at once."""
    temporary, previous = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".previous")
    shutil.rmtree(temporary, ignore_errors=True)
    half = OlmoeForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        os.replace(folder, previous)
    os.replace(temporary, folder)
    shutil.rmtree(previous, ignore_errors=True)
