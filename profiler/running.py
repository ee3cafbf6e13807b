"""What every job that runs a model needs: where its inputs go, and evaluation mode for as long as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def embeddings_of(model: Any) -> Any:
    """The token embeddings of a model; None where it does not tell."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def input_device(model: nn.Module) -> torch.device:
    """Where token ids have to be; also right for a model whose weights are spread or on disk."""
    embeddings = embeddings_of(model)
    weight = getattr(embeddings, "weight", None)
    if isinstance(weight, Tensor) and not weight.is_meta:
        return weight.device
    devices = [parameter.device for parameter in model.parameters() if not parameter.is_meta]
    hook_device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(hook_device) if hook_device is not None else devices[0] if devices else torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while entered; afterwards whatever the model was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
