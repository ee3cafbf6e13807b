"""Puts what a layer edit makes into the modules of a loaded model, in the orientation that each family keeps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compressor.edits.activations import NarrowExperts, NarrowInput
from compressor.edits.layer import LayerEdit
from compressor.families import ExpertsLayout, SeparateLayout, takes_expert_map
from compressor.families.calls import read_output
from compressor.families.special.dbrx import DbrxLayout
from compressor.journal import Journal
from compressor.sites import Site, router_tensors
from compressor.weights import ExpertWeights
from moescope.errors import ModelError

_COUNTS = (
    *("num_experts", "num_local_experts", "num_routed_experts", "n_routed_experts", "moe_num_experts"),
    *("total_experts", "n_total_experts", "num_router_classes"),
)
_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_dim", "ffn_hidden_size")


def replace_experts(journal: Journal, site: Site, edit: LayerEdit) -> None:
    """The routed experts of one layer."""
    layout = site.layout
    assert layout is not None
    if isinstance(layout, DbrxLayout):
        _packed(journal, site, edit)
    elif isinstance(layout, SeparateLayout):
        _separate(journal, site, edit, layout)
    else:
        _stacked(journal, site, edit, layout)
    if edit.zero_output and "bias" in site.experts._parameters:  # JetMoE adds it whatever its experts put out
        journal.tensor(site.experts, "bias", torch.zeros_like(site.experts.get_parameter("bias")))
    for module in site.experts.modules():
        _renumber(journal, module, _COUNTS, layout.num_weighted, edit.count, len(layout.weightless))
        _renumber(journal, module, _WIDTHS, layout.width, edit.width)
    for block in site.blocks:
        _renumber(journal, block, _WIDTHS, layout.width, edit.width)


def cut_experts(journal: Journal, experts: nn.Module, layout: ExpertsLayout, count: int) -> None:
    """Leave room for ``count`` experts in a module whose tensors are to be filled from a checkpoint."""
    packed = isinstance(layout, DbrxLayout)
    names = ["mlp.w1", "mlp.v1", "mlp.w2"] if packed else [layout.up_name, layout.down_name]
    names += [f"{name}_bias" for name in names if layout.biased]
    gone = (layout.num_weighted - count) * (layout.width if packed else 1)
    for name in names:
        tensor = experts.get_parameter(name).detach()
        journal.tensor(experts, name, tensor[: len(tensor) - gone].clone())
    for module in experts.modules():
        _renumber(journal, module, _COUNTS, layout.num_weighted, count, len(layout.weightless))


def replace_router(journal: Journal, site: Site, edit: LayerEdit) -> None:
    """What the router, or the block around it, keeps per expert."""
    if site.router is None:
        return
    before, after = edit.shape.num_experts, edit.count
    for owner, name, tensor in list(router_tensors(site)):
        values = tensor.detach()
        rows = values[0] if values.ndim == 2 and name != site.projection else values
        rows = edit.bias(rows) if "bias" in name else edit.rows(rows)
        journal.tensor(owner, name, rows if rows.ndim == values.ndim else rows[None])
    stored = len(site.router.get_parameter(site.projection))
    for module in (*site.router.modules(), *site.blocks):
        _renumber(journal, module, _COUNTS, before, after, stored - after)
    linear = site.router.get_submodule(site.projection.rpartition(".")[0])
    if isinstance(linear, nn.Linear):
        journal.attribute(linear, "out_features", stored)


def changes_shared(edit: LayerEdit) -> bool:
    """Whether the shared experts of a layer, if it has any, are cut, quantized, smoothed or silenced."""
    narrow = (0, "shared") in edit.bits or edit.smoothing is not None
    return edit.zero_output or (0, "shared") in edit.kept or narrow


def require_shared(site: Site) -> None:
    """Refuse shared experts that cannot be edited.

    Raises:
        ModelError: they are kept in a way that is not known.
    """
    assert site.shared is not None
    read_shared(site.shared.module, shared_names(site))


def replace_shared(journal: Journal, site: Site, edit: LayerEdit) -> None:
    """The shared experts beside the routed ones, where the edit changes them."""
    if site.shared is None or not changes_shared(edit):
        return
    module: Any = site.shared.module
    names = shared_names(site)
    before = read_shared(module, names)
    after = edit.shared(before)
    gate = [] if after.gate is None or len(names) == 3 else [after.gate]
    tensors = {names[-1]: after.down, names[-2]: torch.cat([*gate, after.up])}
    if len(names) == 3 and after.gate is not None:
        tensors[names[0]] = after.gate
    for name, tensor in tensors.items():
        _put_projection(journal, module, name, tensor)
    _renumber(journal, module, (*_WIDTHS, "hidden_size"), before.width, after.width)


def require_narrowable(site: Site, edit: LayerEdit) -> None:
    """Refuse experts that cannot be run one by one, between whose projections activations could be narrowed.

    Raises:
        ModelError: with the class of the experts.
    """
    if not takes_expert_map(site.adapter) or site.adapter.output is not read_output or site.adapter.weights_input:
        raise ModelError(
            f"{site.name} ({type(site.experts).__name__}) is not called with (hidden, ids, weights), so that what"
            " enters its experts cannot be narrowed: plan without activation_bits"
        )
    if site.shared is not None and (0, "shared") in edit.bits and not list(_shared_linears(site)):
        raise ModelError(
            f"the shared experts of {site.name} ({type(site.shared.module).__name__}) are no linear modules, so that"
            " what enters them cannot be narrowed: plan without activation_bits, or without widths of shared experts"
        )


def narrow_activations(journal: Journal, site: Site, edit: LayerEdit, bits: int) -> None:
    """From now on, what enters the experts and their second projections is on grids, token by token."""
    journal.hook(site.experts.register_forward_hook(NarrowExperts(site.adapter, bits), with_kwargs=True))
    for linear in _shared_linears(site) if (0, "shared") in edit.bits else ():
        journal.hook(linear.register_forward_pre_hook(NarrowInput(bits)))


def _shared_linears(site: Site) -> Iterator[nn.Linear]:
    if site.shared is not None:
        yield from (module for module in site.shared.module.modules() if isinstance(module, nn.Linear))


def _stacked(journal: Journal, site: Site, edit: LayerEdit, layout: ExpertsLayout) -> None:
    """Two tensors with all experts in axis 0, and their biases."""
    names = {layout.up_name: "first", layout.down_name: "down"}
    if layout.biased:
        names |= {f"{layout.up_name}_bias": "first_bias", f"{layout.down_name}_bias": "down_bias"}
    sources = [edit.untouched(index) for index in range(edit.count)]
    new: dict[str, Tensor] = {}
    for index, source in enumerate(sources):
        made = None if source is not None else _oriented(edit.expert(index, site.read), layout)
        for name, part in names.items():
            old = site.experts.get_parameter(name).detach()
            value = old[source] if made is None else made[part]
            if name not in new:
                # LongCat keeps rows in the first projection for experts that have no weights; nothing reads them.
                spare = len(old) - layout.num_weighted
                new[name] = value.new_zeros(edit.count + spare, *value.shape)
            new[name][index] = value
    for name, tensor in new.items():
        journal.tensor(site.experts, name, tensor)
    for name, size in (("output_size", len(new[layout.up_name][0])), ("input_size", edit.width)):
        linear = site.experts.get_submodule(
            (layout.up_name if name == "output_size" else layout.down_name).rpartition(".")[0]
        )
        if linear is not site.experts and name in vars(linear):
            journal.attribute(linear, name, size)


def _oriented(weights: ExpertWeights, layout: ExpertsLayout) -> dict[str, Tensor]:
    first = _joined(weights.gate, weights.up, layout)
    made = {"first": first.T, "down": weights.down.T} if layout.transposed else {"first": first, "down": weights.down}
    if weights.up_bias is not None:
        made["first_bias"] = _joined(weights.gate_bias, weights.up_bias, layout)
    if weights.down_bias is not None:
        made["down_bias"] = weights.down_bias
    return made


def _joined(gate: Tensor | None, up: Tensor, layout: ExpertsLayout) -> Tensor:
    if gate is None:
        return up
    return torch.stack([gate, up], 1).flatten(0, 1) if layout.interleaved else torch.cat([gate, up])


def _packed(journal: Journal, site: Site, edit: LayerEdit) -> None:
    """DBRX: all experts one below the other in 2-D."""
    found = [edit.expert(index, site.read) for index in range(edit.count)]
    journal.tensor(site.experts, "mlp.w1", torch.cat([weights.gate for weights in found if weights.gate is not None]))
    journal.tensor(site.experts, "mlp.v1", torch.cat([weights.up for weights in found]))
    journal.tensor(site.experts, "mlp.w2", torch.cat([weights.down.T for weights in found]))


def _separate(journal: Journal, site: Site, edit: LayerEdit, layout: SeparateLayout) -> None:
    """Modules of their own: kept ones are the same objects, others are copies with weights of their own."""
    if "." in layout.expert_name:
        raise ModelError(f"{site.name} keeps its experts at {layout.expert_name!r}: that cannot be edited in memory")
    children: dict[str, nn.Module] = {}
    for index in range(edit.count):
        source = edit.untouched(index)
        slot = edit.slots[index]
        lead = slot.lead if slot is not None else edit.experts[0].lead
        module = layout.expert(site.experts, lead if source is None else source)
        children[layout.expert_name.format(index)] = (
            _copied(module, edit.expert(index, site.read), layout) if source is None else module
        )
    journal.modules(site.experts, children)


def _copied(module: nn.Module, weights: ExpertWeights, layout: SeparateLayout) -> nn.Module:
    twin = copy.deepcopy(module)
    scratch = Journal()  # the copy is nobody else's: nothing has to be taken back
    parts = {layout.up_name: weights.up, layout.down_name: weights.down, layout.gate_name: weights.gate}
    biases = {
        layout.up_name: weights.up_bias,
        layout.down_name: weights.down_bias,
        layout.gate_name: weights.gate_bias,
    }
    for name, tensor in parts.items():
        if tensor is not None:
            _put_projection(scratch, twin, name, tensor)
            bias = biases[name]
            if bias is not None:
                scratch.tensor(twin, f"{name}.bias", bias)
    return twin


def shared_names(site: Site) -> tuple[str, ...]:
    """Names of (gate, up, down), (up, down), or (both, down), in the shared module."""
    assert site.shared is not None
    own = {name.removesuffix(".weight") for name, tensor in site.shared.module.named_parameters() if tensor.ndim > 1}
    known = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))
    for names in (*known, ("up_proj", "down_proj")):
        if own == set(names):
            return names
    raise ModelError(f"the shared experts of {site.name} ({type(site.shared.module).__name__}) cannot be edited")


def read_shared(module: nn.Module, names: tuple[str, ...]) -> ExpertWeights:
    found = [_projection(module, name) for name in names]
    down, first = found[-1], found[-2]
    if len(names) == 3:
        return ExpertWeights(up=first, down=down, gate=found[0])
    width = down.shape[1]
    if len(first) == width:
        return ExpertWeights(up=first, down=down)
    return ExpertWeights(up=first[width:], down=down, gate=first[:width])


def _projection(module: nn.Module, name: str) -> Tensor:
    """A projection as (out, in); one expert that is stacked stands in axis 0 alone."""
    tensor: Any = getattr(module, name)
    tensor = tensor if isinstance(tensor, Tensor) else tensor.weight
    if getattr(getattr(module, name), "bias", None) is not None:
        raise ModelError(f"{type(module).__name__} has a bias in {name}: its shared experts cannot be edited")
    if tensor.ndim == 3 and len(tensor) > 1:
        raise ModelError(f"{type(module).__name__} keeps {len(tensor)} shared experts apart: they cannot be edited")
    values: Tensor = tensor.detach()
    return values[0] if values.ndim == 3 else values


def _put_projection(journal: Journal, module: nn.Module, name: str, tensor: Tensor) -> None:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    if isinstance(found, Tensor):
        journal.tensor(module, name, tensor[None] if found.ndim == 3 else tensor)
        return
    journal.tensor(module, f"{name}.weight", tensor)
    if isinstance(found, nn.Linear):
        journal.attribute(found, "out_features", tensor.shape[0])
        journal.attribute(found, "in_features", tensor.shape[1])


def _renumber(
    journal: Journal, module: nn.Module, names: tuple[str, ...], before: int, after: int, extra: int = 0
) -> None:
    """Attributes of these names that hold the count or width of before; ``extra`` more where they count others too."""
    for name in names:
        value = vars(module).get(name)
        if isinstance(value, bool) or value not in (before, before + extra):
            continue
        new = after if value == before else after + extra
        if value != new:
            journal.attribute(module, name, new)
