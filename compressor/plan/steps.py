"""The steps of a plan: what happens to which (layer, expert, role).

Numbers of layers and experts are always those of the source checkpoint, whatever stands in earlier steps: a plan can be
read beside the run that it comes from. ``step`` numbers the calls of a layer's experts, as in a run; 0 for nearly all
families.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator

Item = TypeVar("Item")

Row = Annotated[tuple[Item, ...], FailFast()]
"""Values of one kind. Of those of a document only the first wrong one is noted: there may be millions."""

Role = Literal["routed", "shared"]
"""Which kind of expert a unit is."""

Form = Literal["uniform", "per_layer", "padded", "shared", "masked"]
"""How an edit is stored.

``uniform``: all layers alike; any engine loads it. ``per_layer``: each layer has its own count or width;
``compressor.load`` loads it. ``padded``: all layers have as many experts as the largest; those that fill up are never
selected, which needs a selection bias (drop, merge). ``shared``: the router keeps all its rows, and a map says which
stored expert each of them stands for; a token that chooses two members of a group runs its expert with the sum of both
gate weights, so that merging exact copies changes nothing; ``compressor.load`` loads it (merge). ``masked``: shapes
stay, what is cut is zero; any engine loads it, nothing is saved (slim).
"""


class Record(BaseModel):
    """What all parts of a plan have in common: never changed once made, and nothing unknown in them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DropLayer(Record):
    """The experts that one layer loses.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        experts: routed experts that go, ascending.
    """

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    experts: Row[int]

    @field_validator("experts")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _ascending(value)


class DropStep(Record):
    """Whole experts, whole MoE blocks or whole decoder layers go.

    Attributes:
        method: by which score or search, as planners name it.
        form: uniform, per_layer or padded.
        layers: experts that go, for the layers that lose any.
        blocks: decoder layers whose MoE block puts out nothing any more (their down projections become zero).
        decoder_layers: decoder layers that go as a whole; those behind them move up.
    """

    step: Literal["drop"] = "drop"
    method: str
    form: Literal["uniform", "per_layer", "padded"] = "uniform"
    layers: Row[DropLayer] = ()
    blocks: Row[int] = ()
    decoder_layers: Row[int] = ()

    @field_validator("blocks", "decoder_layers")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _ascending(value)


class MergeGroup(Record):
    """Experts that become one.

    Attributes:
        lead: the member in whose place the merged expert stands; neurons are aligned to its neurons.
        members: all members, ascending, the lead among them.
        weights: each member's part of the average; they sum to 1.
        weight: importance of the group's expert, on the scale of what is given up (method ``segments``).
        fixed: the lead stays as it is and takes nothing (method ``segments``).
    """

    lead: int = Field(ge=0)
    members: Row[int] = Field(min_length=1)
    weights: Row[float]
    weight: float = Field(default=1.0, ge=0)
    fixed: bool = False


class GivenUp(Record):
    """An expert that goes, and what its neurons weigh where kept experts take them.

    Attributes:
        expert: its number.
        weight: its importance, on the scale of the kept experts' weights.
    """

    expert: int = Field(ge=0)
    weight: float = Field(ge=0)


class MergeLayer(Record):
    """The groups of one layer.

    Attributes:
        layer: decoder layer.
        step: call of the layer's experts.
        groups: every expert that stays or is merged stands in exactly one group, by ascending lead.
        given_up: experts in no group (method ``segments``).
    """

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    groups: Row[MergeGroup]
    given_up: Row[GivenUp] = ()


MergeMethod = Literal["average", "aligned", "nearest", "subspace", "segments"]
"""How the members of a group become one expert.

``average``: weighted mean, neuron by neuron as they are numbered. ``aligned``: the same, after each member's neurons
were matched to the lead's (M-SMoE). ``nearest``: the member whose weights are nearest to the group's mean, with its own
router row (STUN). ``subspace``: the average, projected on the leading output directions of the members (Sub-MoE,
truncated). ``segments``: kept experts are rebuilt from their own neurons and from those of experts given up (DERN).
"""


class MergeStep(Record):
    """Groups of experts become one expert each.

    Attributes:
        grouping: by which planner the groups were found.
        method: how their weights become one.
        router: the merged expert's router row is the lead's, or the weighted mean of the members'.
        form: uniform, per_layer, padded or shared; with shared the lead's row is one of all that stay.
        rank: directions kept (method ``subspace``).
        threshold: least cosine at which a neuron moves (method ``segments``).
        layers: the groups, layer by layer.
    """

    step: Literal["merge"] = "merge"
    grouping: str
    method: MergeMethod
    router: Literal["lead", "mean"] = "lead"
    form: Literal["uniform", "per_layer", "padded", "shared"] = "uniform"
    rank: int | None = Field(default=None, ge=1)
    threshold: float | None = Field(default=None, ge=-1, le=1)
    layers: Row[MergeLayer]


class SlimExpert(Record):
    """The neurons that one expert keeps.

    Attributes:
        expert: its number; shared experts are kept merged in one module, which is number 0.
        role: routed or shared.
        kept: one bit per neuron, 1 = kept; packed, in base64. Read it with :meth:`mask`.
    """

    expert: int = Field(ge=0)
    role: Role = "routed"
    kept: str

    @staticmethod
    def of(*, expert: int, mask: NDArray[np.bool_], role: Role = "routed") -> SlimExpert:
        """From a mask (neurons,)."""
        packed = np.packbits(np.asarray(mask, dtype=bool)).tobytes()
        return SlimExpert(expert=expert, role=role, kept=base64.b64encode(packed).decode("ascii"))

    def mask(self, width: int) -> NDArray[np.bool_]:
        """(width,) bool, true where the neuron stays.

        Raises:
            ValueError: the mask is damaged, or of another width.
        """
        try:
            packed = base64.b64decode(self.kept, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"the neurons of {self.role} expert {self.expert} cannot be read: {error}") from error
        if len(packed) != (width + 7) // 8:
            raise ValueError(f"the neurons of {self.role} expert {self.expert} are not {width}")
        return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=width).astype(bool)


class SlimLayer(Record):
    """The neurons of one layer's experts; experts that are not named keep all of theirs."""

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    experts: Row[SlimExpert]


class SlimStep(Record):
    """Experts lose neurons.

    Attributes:
        method: by which score, as planners name it.
        form: uniform, per_layer or masked.
        width: neurons of every routed expert afterwards (form uniform).
        layers: the neurons that stay, layer by layer.
    """

    step: Literal["slim"] = "slim"
    method: str
    form: Literal["uniform", "per_layer", "masked"]
    width: int | None = Field(default=None, ge=1)
    layers: Row[SlimLayer]


def _ascending(value: tuple[int, ...]) -> tuple[int, ...]:
    if list(value) != sorted(set(value)) or any(number < 0 for number in value):
        raise ValueError("numbers must ascend, without repetition")
    return value
