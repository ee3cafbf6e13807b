"""The MoE layers of a checkpoint: which tensors make each of them up, and reading one expert of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compressor.checkpoint.files import Checkpoint, Reader
from compressor.checkpoint.headers import FLOATS, Entry
from compressor.checkpoint.slots import Slot, find_slots
from compressor.families.checkpoint import OTHER_STACKS, PREDICTION_STACKS, TensorName, read_name
from moescope.errors import ModelError

if TYPE_CHECKING:
    from compressor.weights import ExpertWeights

Tensor = tuple[TensorName, Entry]

_UNKNOWN = ("expert", "router", "moe_statics")
"""Words in names of an MoE layer behind which something per expert may stand."""


@dataclass
class StoredLayer:
    """The tensors of one MoE layer.

    Attributes:
        layer: its number in the checkpoint.
        experts: tensors of routed experts; one by one, or all in one.
        shared: tensors of the shared experts.
        around: router rows, biases, scales and tables: what has one entry per expert beside the experts.
    """

    layer: int
    experts: list[Tensor] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)
    around: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of the router: one per expert, those without weights included."""
        return next((entry.shape[0] for name, entry in self.around if name.kind == "router"), 0)

    @property
    def separate(self) -> bool:
        """Experts are stored one by one."""
        return all(name.expert is not None for name, _ in self.experts)

    @property
    def quantized(self) -> str:
        """The first tensor that is no plain weight or bias; empty where all are."""
        for name, entry in self.experts:
            if name.what not in ("weight", "bias") or entry.dtype not in FLOATS:
                return f"{name.name} ({entry.dtype})"
        return ""

    def num_experts(self, width: int | None = None) -> int:
        """E, as the tensors say; ``width`` is only needed where experts are packed in two dimensions."""
        if self.separate:
            return 1 + max(name.expert or 0 for name, _ in self.experts if name.part == "down")
        name, entry = next((name, entry) for name, entry in self.experts if name.expert is None)
        return entry.shape[0] // (width or entry.shape[0]) if name.packed else entry.shape[0]


@dataclass(frozen=True)
class Decoder:
    """The stack of decoder layers that holds the experts of text.

    Attributes:
        stack: path of its layers.
        names: every tensor of the checkpoint with what its name says.
        layers: number -> tensors, for the MoE layers.
        beyond: numbers of layers behind the last one, and ``mtp`` stacks: they predict further tokens.
    """

    stack: str
    names: dict[str, TensorName]
    layers: dict[int, StoredLayer]
    beyond: tuple[str, ...]


def read_decoder(checkpoint: Checkpoint, *, model_type: str, num_layers: int) -> Decoder:
    """Find the decoder's MoE layers among the tensors.

    Raises:
        ModelError: there are none, several stacks of them, or a tensor that the table of names cannot place.
    """
    names = {name: read_name(name, model_type) for name in checkpoint.entries}
    experts = [name for name in names.values() if name.kind == "expert"]
    stacks = sorted({name.stack for name in experts if not OTHER_STACKS.search(name.stack)})
    text = [stack for stack in stacks if not PREDICTION_STACKS.search(stack)]
    if not text:
        raise ModelError(
            f"{checkpoint.folder} holds no experts whose names are known (compressor/families/checkpoint.py)"
        )
    if len(text) > 1:
        raise ModelError(f"{checkpoint.folder} holds experts in several stacks of layers: {', '.join(text)}")
    layers = {number: StoredLayer(number) for number in range(num_layers)}
    for name, entry in ((names[entry.name], entry) for entry in checkpoint.entries.values()):
        if name.stack != text[0] or name.layer >= num_layers:
            continue
        if name.kind == "expert":
            layers[name.layer].experts.append((name, entry))
        elif name.kind == "shared":
            layers[name.layer].shared.append((name, entry))
        elif name.kind != "plain":
            layers[name.layer].around.append((name, entry))
    moe = {number: layer for number, layer in layers.items() if layer.experts}
    beyond = {name.stack for name in names.values() if PREDICTION_STACKS.search(name.name.partition(".layers.")[0])}
    beyond |= {
        f"{name.stack}.{name.layer}" for name in names.values() if name.stack == text[0] and name.layer >= num_layers
    }
    return Decoder(text[0], names, moe, tuple(sorted(beyond)))


def check_layer(
    layer: StoredLayer,
    names: Iterable[TensorName],
    entries: dict[str, Entry],
    *,
    num_experts: int,
    extra_rows: int,
    routed: int | None = None,
) -> None:
    """Refuse a layer that is not complete, or that holds something per expert which nobody knows.

    Args:
        layer: the layer.
        names: all names of the layer's stack.
        entries: all tensors.
        num_experts: experts that it has to hold.
        extra_rows: rows of the router behind those of the experts.
        routed: experts that the router chooses from, where several of its rows stand for one; None = those it holds.

    Raises:
        ModelError: with the tensor.
    """
    _check_numbers(layer, num_experts)
    routed = num_experts if routed is None else routed
    for name, entry in layer.around:
        rows = entry.shape[-1] if entry.shape[:1] == (1,) else entry.shape[0]
        if name.kind == "router" and rows != routed + extra_rows:
            raise ModelError(f"layer {layer.layer} holds {num_experts} experts and router rows for {rows}: {name.name}")
        per_expert = name.kind in ("router_bias", "selection_bias", "expert_scale")
        if per_expert and rows not in (routed, routed + extra_rows):
            raise ModelError(f"{name.name} has shape {list(entry.shape)} for {routed} experts")
    for name in names:
        if name.layer == layer.layer and name.kind == "plain" and _unknown(name, entries[name.name], routed):
            raise ModelError(
                f"{name.name} {list(entries[name.name].shape)} may hold one entry per expert, and its name is not"
                " known: this family has to be added to compressor/families/checkpoint.py"
            )


def _check_numbers(layer: StoredLayer, num_experts: int) -> None:
    """Every projection of every expert is there."""
    if not layer.rows:
        raise ModelError(f"layer {layer.layer} has experts and no router whose name is known")
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name, _ in layer.experts:
        if name.expert is not None:
            numbers[name.part or "", name.what].add(name.expert)
    for (part, what), found in numbers.items():
        missing = set(range(num_experts)) - found
        # LongCat stores projections of its experts without weights, too.
        if missing or max(found) >= layer.rows:
            raise ModelError(
                f"layer {layer.layer} has {len(found)} of {num_experts} experts' {part} {what}"
                + (f"; that of expert {min(missing)} is missing" if missing else "; is the plan for this model?")
            )


_KNOWN_PLAIN = (
    "shared_expert_gate", "router.scale", "global_scale", "pre_expert", "post_expert", "router_mlp", "router_states",
    "norm",
)  # fmt: skip


def _unknown(name: TensorName, entry: Entry, num_experts: int) -> bool:
    rest = name.name[len(f"{name.stack}.{name.layer}.") :]
    if rest.startswith(("self_attn", "attn", "self_attention")) or any(word in rest for word in _KNOWN_PLAIN):
        return False
    return num_experts in entry.shape and any(word in rest for word in _UNKNOWN)


@dataclass
class ExpertReader:
    """Reads single experts of one layer, whatever files hold them.

    Attributes:
        layer: its tensors.
        num_experts: E.
        width: neurons per expert.
        hidden: channels that enter and leave an expert.
        model_type: of the family.
    """

    layer: StoredLayer
    num_experts: int
    width: int
    hidden: int
    model_type: str
    slots: dict[str, Slot] = field(init=False)
    _of_expert: dict[int | None, list[Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._of_expert = defaultdict(list)
        for name, entry in self.layer.experts:
            self._of_expert[name.expert].append((name, entry))
        first = [
            (name, self._part_shape(name, entry)) for name, entry in self.layer.experts if name.expert in (None, 0)
        ]
        found = find_slots(first, width=self.width, hidden=self.hidden, model_type=self.model_type)
        kinds = {(name.part, name.what): slot for (name, _), slot in zip(first, found, strict=True)}
        self.slots = {}
        for name, entry in self.layer.experts:
            slot = self.slots[name.name] = kinds[name.part, name.what]
            if self._part_shape(name, entry) != slot.shape(self.width, self.hidden):
                raise ModelError(
                    f"{name.name} has shape {list(entry.shape)}, other than its siblings of {self.width} neurons"
                    f" between {self.hidden} channels"
                )

    def _part_shape(self, name: TensorName, entry: Entry) -> tuple[int, ...]:
        if name.expert is not None:
            return entry.shape
        if entry.shape[0] != self.num_experts * (self.width if name.packed else 1):
            raise ModelError(f"{name.name} has shape {list(entry.shape)}, which are not {self.num_experts} experts")
        return (self.width, *entry.shape[1:]) if name.packed else entry.shape[1:]

    def rows(self, name: TensorName) -> int:
        """Rows of a tensor of all experts that belong to one of them."""
        return self.width if name.packed else 1

    def read(self, reader: Reader, expert: int) -> ExpertWeights:
        """One expert in the orientation of :class:`ExpertWeights`, in the checkpoint's types."""
        from compressor.weights import ExpertWeights

        parts = {}
        for name, entry in self._of_expert[None]:
            stored = reader.rows(entry, expert * self.rows(name), self.rows(name))
            parts.update(self.slots[name.name].parts(stored if name.packed else stored[0]))
        for name, entry in self._of_expert[expert]:
            parts.update(self.slots[name.name].parts(reader.tensor(entry)))
        return ExpertWeights(**parts)


def shared_slots(layer: StoredLayer, width: int, hidden: int) -> dict[str, Slot]:
    """Name -> how it stores its part of the shared experts, which are merged in one module."""
    tensors = [(name, entry.shape) for name, entry in layer.shared]
    slots = find_slots(tensors, width=width, hidden=hidden, model_type="")
    return {name.name: slot for (name, _), slot in zip(tensors, slots, strict=True)}


def read_shared(layer: StoredLayer, width: int, hidden: int, reader: Reader) -> ExpertWeights:
    """The shared experts of a layer, in the checkpoint's types.

    Args:
        layer: its tensors.
        width: neurons of all shared experts.
        hidden: channels of the residual stream, which they read and write.
        reader: of the files.
    """
    from compressor.weights import ExpertWeights

    slots, parts = shared_slots(layer, width, hidden), {}
    for name, entry in layer.shared:
        parts.update(slots[name.name].parts(reader.tensor(entry)))
    return ExpertWeights(**parts)
