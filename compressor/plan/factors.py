"""Experts kept as a shared centre and a small difference: the step that factors them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compressor.plan.steps import Record, Row


class FactorGroup(Record):
    """Experts that share a centre.

    Attributes:
        lead: the member whose neurons the others are aligned to.
        members: all members, ascending, the lead among them; one alone shares with nobody.
        weights: each member's part of the centre; they sum to 1.
    """

    lead: int = Field(ge=0)
    members: Row[int] = Field(min_length=1)
    weights: Row[float]


class FactorLayer(Record):
    """The groups of one layer, by ascending lead; experts that stay and stand in none keep their weights."""

    layer: int = Field(ge=0)
    step: int = Field(default=0, ge=0)
    groups: Row[FactorGroup]


class FactorStep(Record):
    """Weights of experts become what few numbers say of them.

    The result is stored rebuilt, in the source's shapes and type: any engine loads it, it shows what the factors cost,
    and it saves nothing yet.

    Attributes:
        grouping: by which planner the groups were found.
        method: ``low_rank_sparse`` = each matrix is a product of two thin ones and some rows as they are (MC-SMoE);
            every expert is a group of its own. ``ternary_residual`` = each member is its group's centre and a sparse
            difference of one magnitude (ComPEFT); an expert alone in its group stays as it is.
        form: ``dense`` = rebuilt.
        rank: columns of the thin matrices (method ``low_rank_sparse``).
        density: part of the rows that stay (``low_rank_sparse``), or of the entries of the difference
            (``ternary_residual``).
        scale: magnitude of the difference as a multiple of its standard deviation (``ternary_residual``).
        layers: the groups, layer by layer.
    """

    step: Literal["factor"] = "factor"
    grouping: str
    method: Literal["low_rank_sparse", "ternary_residual"]
    form: Literal["dense"] = "dense"
    rank: int | None = Field(default=None, ge=1)
    density: float = Field(ge=0, le=1)
    scale: float | None = Field(default=None, gt=0)
    layers: Row[FactorLayer]

    @model_validator(mode="after")
    def _has_its_numbers(self) -> FactorStep:
        if (self.method == "low_rank_sparse") != (self.rank is not None):
            raise ValueError("method low_rank_sparse goes with a rank, and no other")
        if (self.method == "ternary_residual") != (self.scale is not None):
            raise ValueError("method ternary_residual goes with a scale, and no other")
        return self
