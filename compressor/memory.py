"""The same edit on a model in memory: ``edit`` for good, ``edited`` for as long as a block runs.

::

    with edited(model, plan):
        result = perplexity(model, batches)      # the model as the plan leaves it
    # here it is as it was, bit for bit

A route step puts hooks before the experts (:mod:`compressor.routing`).

The model's configuration says what its modules hold afterwards, layer by layer where layers differ, so that
``save_pretrained`` and :func:`compressor.load.load` go on working where the family's classes can say it. To write a
checkpoint, use ``compressor.apply``: it also fills up what a family ties together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from compressor.edits.layer import LayerEdit, layer_edits
from compressor.edits.moments import LayerMoments
from compressor.families import expert_map_of, router_traits, takes_expert_map
from compressor.journal import Journal
from compressor.plan import ROUTE, LayerKey, LayerShape, Plan, kept_layers, route_after
from compressor.readers import readers_of
from compressor.removal import remove_layers, require_removable
from compressor.replacement import (
    changes_shared,
    narrow_activations,
    replace_experts,
    replace_router,
    replace_shared,
    require_narrowable,
    require_shared,
)
from compressor.routing import install, reroute_of, rules_of
from compressor.sites import Decoder, Site, find_decoder
from compressor.sizes import require_sizes, write_sizes
from moescope.errors import ModelError, PlanError


def edit(model: nn.Module, plan: Plan, *, moments: Mapping[LayerKey, LayerMoments] | None = None) -> None:
    """Do to the experts of a loaded model what a plan says, in place; narrower activations included.

    What can be refused is refused before the first change. Old tensors are let go layer by layer.

    Args:
        model: of transformers; on any device, its weights plain tensors.
        plan: numbers are those of the model as it is now.
        moments: (layer, step) -> second moments, for method ``subspace``.

    Raises:
        PlanError: the plan is for another model, or lacks what its method needs.
        ModelError: weights that are packed, offloaded or of a family that cannot be edited.
    """
    _change(Journal(remember=False), model, plan, moments)


@contextmanager
def edited(model: nn.Module, plan: Plan, *, moments: Mapping[LayerKey, LayerMoments] | None = None) -> Iterator[None]:
    """While entered, the model is as :func:`edit` leaves it; afterwards as it was, whatever happens.

    Tensors that the plan does not touch stay the same objects, so that many plans can be measured on one loaded model;
    old and new tensors of touched layers are in memory together.

    Raises:
        PlanError, ModelError: as :func:`edit`; the model is as it was.
    """
    journal = Journal()
    try:
        _change(journal, model, plan, moments)
        yield
    finally:
        journal.undo()


@torch.no_grad()
def _change(journal: Journal, model: nn.Module, plan: Plan, moments: Mapping[LayerKey, LayerMoments] | None) -> None:
    decoder = find_decoder(model, plan.source)
    edits = layer_edits(plan, moments)
    kept, route = kept_layers(plan), route_after(plan)
    _require_unrouted(decoder)
    changed = {key: edit for key, edit in edits.items() if edit.changes}
    for key, edit in changed.items():
        _require_editable(decoder, edit.shape, edit, key)
    readers = {
        key: readers_of(decoder, decoder.sites[key], key[0])
        for key, edit in changed.items()
        if edit.smoothing is not None
    }
    require_removable(decoder, kept)
    require_sizes(decoder, edits)
    for key, edit in changed.items():
        site = decoder.sites[key]
        edit.decide(site.read)
        if key in readers:
            _decide_scales(site, edit)
        if [edit.untouched(index) for index in range(edit.count)] != list(range(edit.shape.num_experts)):
            replace_experts(journal, site, edit)
        if edit.expert_map is not None:
            assert site.layout is not None
            journal.expert_map(site.experts, edit.expert_map.tolist(), len(site.layout.weightless))
        if not edit.same_router:
            replace_router(journal, site, edit)
        replace_shared(journal, site, edit)
        if edit.smoothing is not None:
            readers[key].smooth(journal, edit.smoothing)
        if edit.activation_bits is not None:
            narrow_activations(journal, site, edit, edit.activation_bits)
    remove_layers(journal, decoder, kept)
    write_sizes(journal, model, decoder, edits, kept)
    if route is not None:
        setattr(decoder.config, ROUTE, route.model_dump(mode="json"))
        for handle in install(model, rules_of(route)).handles:
            journal.hook(handle)


def _require_unrouted(decoder: Decoder) -> None:
    for (layer, _), site in decoder.sites.items():
        if reroute_of(site.experts) is not None:
            raise ModelError(
                f"layer {layer} runs other experts than its router chooses ({ROUTE}): edit the source, with both steps"
                " in one plan"
            )


def _decide_scales(site: Site, edit: LayerEdit) -> None:
    assert site.router is not None
    edit.smooth(site.read, site.router.get_parameter(site.projection).detach())


def _require_editable(decoder: Decoder, shape: LayerShape, edit: LayerEdit, key: LayerKey) -> None:
    if key not in decoder.sites:
        raise ModelError(
            f"layer {key[0]} runs its experts several times: those of its step {key[1]} are no list of their own that"
            " could be edited"
        )
    site = decoder.sites[key]
    layout = site.layout
    kind = type(site.experts).__name__
    if layout is None:
        raise ModelError(f"{site.name} ({kind}) keeps its weights packed: load the model dequantized to edit it")
    if (layout.num_weighted, layout.width) != (shape.num_experts, shape.width):
        raise PlanError(
            f"the plan is for {shape.num_experts} experts of width {shape.width} in layer {key[0]}; the model has"
            f" {layout.num_weighted} of width {layout.width}"
        )
    if any(tensor.is_meta for tensor in site.experts.parameters()):
        raise ModelError(f"{site.name} is not in memory: load the model without offloading to edit it")
    if edit.zero_output and layout.weightless:
        raise ModelError(f"{site.name} has experts that give back their input: its block cannot be silenced")
    if site.shared is not None and changes_shared(edit):
        require_shared(site)
    if expert_map_of(site.experts) is not None:
        raise ModelError(f"{site.name} keeps experts that stand for several rows of its router: edit the source of it")
    if edit.expert_map is not None and not takes_expert_map(site.adapter):
        raise ModelError(
            f"{site.name} ({kind}) is not called with (hidden, ids, weights), so that no map can stand before it: use"
            " another form than shared"
        )
    if not edit.same_router:
        _require_router(site, edit, key)
    if edit.activation_bits is not None:
        require_narrowable(site, edit)


def _require_router(site: Site, edit: LayerEdit, key: LayerKey) -> None:
    kind = type(site.experts).__name__
    if site.router is None:
        raise ModelError(f"{site.name} ({kind}) has no router with one row per expert: its experts cannot go")
    if getattr(site.router, "tid2eid", None) is not None:
        raise ModelError(f"layer {key[0]} chooses experts by a table of token ids: its experts cannot go")
    if None in edit.slots and _shares_a_softmax(site):
        raise ModelError(
            f"{site.name} ({kind}) chooses by a softmax over all experts, of which those that only fill up would have a"
            " part: use form per_layer"
        )


def _shares_a_softmax(site: Site) -> bool:
    """Scores become smaller by every expert there is, selected or not, and no bias of the logits can keep one out."""
    biased = dict(site.router.named_parameters()) if site.router is not None else {}
    config = getattr(site.experts, "config", None)
    names = type(site.router).__name__, type(site.experts).__name__
    score = router_traits(router_class=names[0], experts_class=names[1], config=config).score
    return score == "softmax" and f"{site.projection.removesuffix('weight')}bias" not in biased
