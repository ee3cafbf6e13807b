"""What a width costs: the run's errors as costs of units, and what a plan has to say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import polars as pl

from compressor.plan import BITS, Bits, LayerKey
from moescope.errors import PlanError
from planner.estimate.stream import streams
from planner.probes import layer_weights
from planner.quantize.errors import LayerErrors, layer_errors
from planner.quantize.grid import groups_in_words, nominal_bits
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units
from planner.task import Array, Task, rounded

THIN = 2.0
"""Times the tokens that an even router would send an expert: what EAQuant draws for each before it trusts an error."""

REASONING = (
    "At 3 bits and below, reasoning suffers long before language does: MC-MoE's Mixtral 8x7B at 2.54 bits falls from"
    " 58.3 to 37.7 on GSM8K and from 59.2 to 29.3 on HumanEval, while its mean over eight language tasks falls from"
    " 71.3 to 67.5 (figures published by others, not measured here)."
)


CostWeigh = Literal["stream", "influence", "equal"]
"""What makes errors of different experts and layers comparable: the stream that they are added to, token by token
(:mod:`planner.estimate.stream`); how far the layer turns it as a whole; nothing."""


EVEN = 0.5
"""Part of what each expert adds that is taken to be spread evenly over its layer: text unlike the run's uses other
experts than its own does. On the bundled model a half takes a quarter off the cost on a domain that the run had
not seen and adds 3 % on others, at 3 bits (benchmarks/README.md)."""


def error_costs(
    units: Units, weigh: CostWeigh, *, even: float = 0.0
) -> tuple[Floats, dict[LayerKey, Array], list[str]]:
    """Squared output errors of the run as costs, experts and layers weighed.

    Where the run did not see the stream, ``stream`` does what ``influence`` does, and the note says so.

    Args:
        units: what gets widths.
        weigh: what makes errors comparable.
        even: with ``stream``, part of what each expert adds that is spread over its layer, 0..1.

    Returns:
        (units, widths) costs, to 6 digits; (layer, step) -> (experts of the source,) cost of the narrowest width; and
        what to note.

    Raises:
        PlanError: the run knows nothing of errors, or another word.
    """
    if weigh not in ("stream", "influence", "equal"):
        raise PlanError(f"weigh {weigh!r} is not known: use stream, influence or equal")
    if not 0 <= even <= 1:
        raise PlanError(f"even {even:g} is no part: give 0 to 1")
    errors, at = layer_errors(units.task), columns_of(units.widths)
    found, note = _by_stream(units.task, errors, even) if weigh == "stream" else (None, "")
    if found is None:
        weights, note = layer_weights(units.task, "equal" if weigh == "equal" else "influence")
        found = {
            key: {part: values * weights[key[0]] for part, values in one.errors.items()} for key, one in errors.items()
        }
    weighed = {key: {part: values[:, at] for part, values in parts.items()} for key, parts in found.items()}
    narrowest = units.per_expert({key: one["all"][:, 0] for key, one in weighed.items()})
    return rounded(units.of(weighed)), {key: rounded(one) for key, one in narrowest.items()}, [note]


def _by_stream(
    task: Task, errors: Mapping[LayerKey, LayerErrors], even: float
) -> tuple[dict[LayerKey, dict[str, Array]] | None, str]:
    """(layer, step) -> part -> (experts, widths) errors as parts of the stream; None where the run did not see it."""
    try:
        known = streams(task)
    except PlanError:
        return None, ""
    found = {}
    for key, one in errors.items():
        part = known[key].evened(even).part * task.layer_factors[key]
        found[key] = {name: one.relative(name) * part[:, None] for name in one.errors}
    note = "Errors count as parts of the squared stream that they are added to, token by token."
    return found, note + (
        f" {even:.0%} of what experts add is taken to be spread evenly over each layer." if even else ""
    )


def columns_of(widths: tuple[Bits, ...]) -> list[int]:
    """Their places in lists of errors."""
    return [BITS.index(one) for one in widths]


def told(units: Units, columns: Whole, errors: dict[LayerKey, LayerErrors] | None = None) -> list[str]:
    """Sentences on a choice: what it takes, how errors are known, and what to beware of.

    Args:
        units: what was given widths.
        columns: (units,) places in its widths.
        errors: what the choice rests on; None = on none.
    """
    bits, nominal = units.effective(units.size(columns)), _nominal(units, columns)
    where = groups_in_words(units.grid.group_size)
    notes = [
        f"{bits:.4g} effective bits per weight, of which {nominal:.4g} are the widths themselves and the rest scales"
        f" and zero points of {where}."
    ]
    if units.shared[:, 0].any():
        part = units.shared[:, 0].sum() / (units.weights.sum() + units.shared[:, 0].sum())
        notes.append(f"Shared experts, {part:.0%} of the weights, have {units.shared_bits or 'all their'} bits.")
    if len(units.protected):
        notes.append("Units with super experts have the widest width.")
    if errors is not None:
        notes += _known(units, errors)
    if bits <= 3:
        notes.append(REASONING)
    return notes


def _known(units: Units, errors: dict[LayerKey, LayerErrors]) -> list[str]:
    mine = [errors[key] for key in units.experts]
    if not all(one.measured for one in mine):
        return [
            "Errors are estimates, each expert's energy times a width's typical error: the run has no level errors."
        ]
    tokens = np.concatenate([one.tokens for one in mine])
    even = np.concatenate([np.full(len(one.tokens), one.tokens.mean()) for one in mine])
    thin, unseen = int((tokens < THIN * even).sum()), int((tokens == 0).sum())
    notes = [
        f"Errors were measured on {math.floor(tokens.sum()):,} sampled uses of experts; {thin} of {len(tokens)} experts"
        f" have fewer than {THIN:g} times the tokens that an even router would send them, EAQuant's target."
    ]
    measured = set(units.task.run.table("expert_grid").filter(pl.col("kind") == "routed")["group_size"].to_list())
    if measured and measured != {units.grid.group_size}:
        words = ", ".join(groups_in_words(size) for size in sorted(measured))
        notes.append(f"Errors were measured in {words}: in {groups_in_words(units.grid.group_size)} they differ.")
    if unseen:
        notes.append(f"{unseen} experts were used by no sampled token: nothing is known of what widths cost them.")
    return notes


def _nominal(units: Units, columns: Whole) -> float:
    """Mean width over all weights."""
    routed = float(units.weights @ np.array([nominal_bits(one) for one in units.widths])[columns])
    shared = int(units.shared[:, 0].sum())
    whole = int(units.weights.sum()) + shared
    return (routed + shared * nominal_bits(units.shared_bits)) / whole
