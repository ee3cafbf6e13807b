"""The Plan: what to do to a checkpoint, from which run, and why. One JSON document; the contract of the backend.

::

    plan = Plan.load("plan.json")
    plan.save("plan.json")
    experts_after(plan)[3, 0]          # what layer 3 holds afterwards, and from whom

Nothing here imports torch. The same run gives the same plan, byte for byte: no timestamps, no measurements.
"""

from compressor.plan.difference import differences
from compressor.plan.document import VERSION, Plan, json_schema
from compressor.plan.evidence import Estimate, Evidence, LayerValues, Protected, Provenance, Target
from compressor.plan.result import NewExpert, experts_after, kept_layers, widths_after
from compressor.plan.source import LayerKey, LayerShape, Source
from compressor.plan.steps import (
    DropLayer,
    DropStep,
    GivenUp,
    MergeGroup,
    MergeLayer,
    MergeStep,
    Role,
    SlimExpert,
    SlimLayer,
    SlimStep,
    Step,
)

__all__ = [
    "VERSION",
    "DropLayer",
    "DropStep",
    "Estimate",
    "Evidence",
    "GivenUp",
    "LayerKey",
    "LayerShape",
    "LayerValues",
    "MergeGroup",
    "MergeLayer",
    "MergeStep",
    "NewExpert",
    "Plan",
    "Protected",
    "Provenance",
    "Role",
    "SlimExpert",
    "SlimLayer",
    "SlimStep",
    "Source",
    "Step",
    "Target",
    "differences",
    "experts_after",
    "json_schema",
    "kept_layers",
    "widths_after",
]
