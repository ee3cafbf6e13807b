"""What a width costs: the run's errors as costs of units, and what a plan has to say of them."""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from compressor.plan import BITS, Bits, LayerKey
from planner.probes import Weigh, layer_weights
from planner.quantize.errors import LayerErrors, layer_errors
from planner.quantize.grid import groups_in_words, nominal_bits
from planner.quantize.programme import Floats, Whole
from planner.quantize.units import Units
from planner.task import Array, rounded

THIN = 2.0
"""Times the tokens that an even router would send an expert: what EAQuant draws for each before it trusts an error."""

REASONING = (
    "At 3 bits and below, reasoning suffers long before language does: MC-MoE's Mixtral 8x7B at 2.54 bits falls from"
    " 58.3 to 37.7 on GSM8K and from 59.2 to 29.3 on HumanEval, while its mean over eight language tasks falls from"
    " 71.3 to 67.5 (figures published by others, not measured here)."
)


def error_costs(units: Units, weigh: Weigh) -> tuple[Floats, dict[LayerKey, Array], list[str]]:
    """Squared output errors of the run as costs, layers weighed.

    Returns:
        (units, widths) costs, to 6 digits; (layer, step) -> (experts of the source,) cost of the narrowest width; and
        what to note.

    Raises:
        PlanError: the run knows nothing of errors, or another word than ``influence`` and ``equal``.
    """
    errors = layer_errors(units.task)
    weights, note = layer_weights(units.task, weigh)
    at = columns_of(units.widths)
    weighed = {
        key: {part: values[:, at] * weights[key[0]] for part, values in one.errors.items()}
        for key, one in errors.items()
    }
    narrowest = units.per_expert({key: one["all"][:, 0] for key, one in weighed.items()})
    return rounded(units.of(weighed)), {key: rounded(one) for key, one in narrowest.items()}, [note]


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
