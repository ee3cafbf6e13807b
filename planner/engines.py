"""What engines load: the forms of cuts, and which widths of packed weights they have kernels for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from compressor.plan import PARTS, QuantizeStep
from moescope.errors import PlanError

OURS = ("per_layer", "shared", "packed")
"""Forms that ``compressor.load`` loads, and other engines at most in part."""


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: how it is asked for.
        title: in words.
        forms: of :data:`OURS`, those that it loads.
        grids: parameters that packed weights have to have.
        note: what is known of it, for the reader.
    """

    name: str
    title: str
    forms: tuple[str, ...] = ()
    grids: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    note: str = ""


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        one.name: one
        for one in (
            Engine("any", "every engine"),
            Engine("transformers", "transformers, through compressor.load", OURS),
            Engine(
                "vllm", "vLLM and SGLang", ("packed",),
                MappingProxyType({"widths": (4, 8), "granularity": "layer", "symmetric": True, "shared_bits": 8}),
                "vLLM and SGLang have kernels for packed widths 4 and 8 without zero points, one width for the experts"
                " of a layer, as their published code says; moescope has not run them.",
            ),
        )
    }
)  # fmt: skip


def find(name: str) -> Engine:
    """The engine of that name.

    Raises:
        PlanError: there is none.
    """
    if name not in ENGINES:
        raise PlanError(f"engine {name!r} is not known: use {', '.join(ENGINES)}")
    return ENGINES[name]


def loads(name: str | None, form: str) -> bool:
    """Whether an engine loads a form; None = whatever ``compressor.load`` does."""
    return name is None or form not in OURS or form in find(name).forms


def grids(name: str | None, known: list[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that packed weights need for an engine, of those that a preset knows and nobody asked for."""
    wanted = {} if name is None else find(name).grids
    return {one: value for one, value in wanted.items() if one in known and one not in given}


def require_kernels(name: str | None, steps: Iterable[Any]) -> None:
    """Refuse packed weights that an engine has no kernels for.

    Raises:
        PlanError: with what it would take.
    """
    if name is None or "packed" not in find(name).forms or not find(name).grids:
        return
    wanted = find(name).grids
    for step in steps:
        if not isinstance(step, QuantizeStep) or step.form != "packed":
            continue
        widths = {one.of(part) for layer in step.layers for one in layer.experts for part in PARTS} - {None}
        wrong = sorted(str(width) for width in widths - set(wanted["widths"]))
        if wrong or step.granularity != wanted["granularity"] or step.symmetric != wanted["symmetric"]:
            asked = f"widths {', '.join(map(str, sorted(map(str, widths))))} at granularity {step.granularity}"
            raise PlanError(
                f"engine {name!r} loads packed widths {' and '.join(map(str, wanted['widths']))} without zero points,"
                f" one for the experts of a layer, not {asked}{'' if step.symmetric else ' with zero points'}"
            )
