"""What reads the channels that enter the experts of a loaded model, and the norm that puts them out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.edits.smooth import Smoothing
from compressor.families.norms import block_norm
from compressor.journal import Journal
from compressor.sites import Decoder, Site
from moescope.errors import ModelError


@dataclass(frozen=True, eq=False)
class Readers:
    """All that has to change together where channels are smoothed, beside the experts.

    Attributes:
        norm: the norm before the block.
        offset: what it adds to its weight before it multiplies.
        matrices: (owner, name) of the tensors (rows, H) whose columns read its channels.
    """

    norm: nn.Module = field(repr=False)
    offset: float
    matrices: tuple[tuple[nn.Module, str], ...] = field(repr=False)

    def smooth(self, journal: Journal, smoothing: Smoothing) -> None:
        """Divide the norm's channels, and multiply the columns of what reads them."""
        for owner, name in self.matrices:
            journal.tensor(owner, name, smoothing.columns(owner.get_parameter(name).detach()))
        for name, tensor in self.norm.named_parameters(recurse=False):
            journal.tensor(self.norm, name, smoothing.gain(tensor.detach(), self.offset if name == "weight" else 0.0))


def readers_of(decoder: Decoder, site: Site, layer: int) -> Readers:
    """The norm before one MoE block, and who reads it beside the experts and the shared experts.

    Raises:
        ModelError: the family is not known to have a norm that serves the block alone, or something in the block is
            not known.
    """
    kind = getattr(decoder.config, "model_type", type(decoder.config).__name__)
    path = block_norm(kind)
    if path is None:
        raise ModelError(
            f"{kind} is not known to have a norm that serves its experts alone, so its channels cannot be smoothed:"
            " plan without smoothing"
        )
    norm = decoder.layers.get_submodule(f"{layer}.{path}")
    assert site.layout is not None
    size = int(norm.get_parameter("weight").shape[0])
    matrices = list(_matrices(site))
    if site.layout.hidden_size != size or any(owner.get_parameter(name).shape[1] != size for owner, name in matrices):
        raise ModelError(f"{site.name} does not read the {size} channels of {path}: plan without smoothing")
    return Readers(norm, _offset(norm, f"layer {layer}, {path}"), tuple(matrices))


def _matrices(site: Site) -> Iterator[tuple[nn.Module, str]]:
    if site.router is None:
        raise ModelError(f"{site.name} has no router whose channels could be smoothed: plan without smoothing")
    known: list[nn.Module] = [site.experts]
    router = [name for name, tensor in site.router.named_parameters() if tensor.ndim > 1 and tensor.shape[0] > 1]
    if router != [site.projection]:
        raise ModelError(f"the router of {site.name} reads its input by {', '.join(router)}: plan without smoothing")
    yield site.router, site.projection
    known.append(site.router)
    if site.shared is not None:
        known.append(site.shared.module)
        gate: Any = site.shared.gate
        if gate is not None:
            known.append(gate)
            yield gate, "weight"
    owned = {id(tensor) for module in known for tensor in module.parameters()}
    for block in site.blocks[:-1]:
        for name, tensor in block.named_parameters():
            if tensor.ndim > 1 and id(tensor) not in owned:
                raise ModelError(f"{name} beside {site.name} may read what enters it: plan without smoothing")


@torch.no_grad()
def _offset(norm: nn.Module, where: str) -> float:
    """0 or 1: by which of the two the norm's output is divided as it should be. Tried, not believed."""
    weight = norm.get_parameter("weight")
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, len(weight), generator=draw).to(weight.device, weight.dtype)
    smoothing = Smoothing(0.5, torch.ones(len(weight)))
    smoothing.decide([], torch.rand(1, len(weight), generator=draw) + 0.5)
    wanted: Tensor = norm(inputs).float()
    for offset in (0.0, 1.0):
        twin = copy.deepcopy(norm)
        Readers(twin, offset, ()).smooth(Journal(remember=False), smoothing)
        found = twin(inputs).float() * smoothing.scales.to(weight.device, torch.float32)
        if float((found - wanted).abs().max()) <= 1e-2 * float(wanted.abs().max()):
            return offset
    raise ModelError(
        f"{where} ({type(norm).__name__}) does not multiply channels by its weight: plan without smoothing"
    )
