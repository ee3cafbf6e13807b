"""The Plan: what to do to a checkpoint, from which run, and why. One JSON document; the contract of the backend.

::

    plan = Plan.load("plan.json")
    plan.save("plan.json")
    experts_after(plan)[3, 0]          # what layer 3 holds afterwards, and from whom

Nothing here imports torch. The same run gives the same plan, byte for byte: no timestamps, no measurements.
"""

from compressor.plan.bits import (
    BITS,
    PARTS,
    Bits,
    ExpertBits,
    QuantizeLayer,
    QuantizeStep,
    SmoothLayer,
    group_size_for,
    stored_bits,
)
from compressor.plan.caching import CacheLayer, CachePolicy, CacheStep, Prefetch
from compressor.plan.difference import differences
from compressor.plan.document import VERSION, CheckpointStep, Plan, ServingStep, Step, json_schema
from compressor.plan.evidence import Estimate, Evidence, LayerValues, Prediction, Protected, Provenance, Speed, Target
from compressor.plan.factors import FactorGroup, FactorLayer, FactorStep
from compressor.plan.placement import PlaceLayer, PlaceStep
from compressor.plan.result import NewExpert, bits_after, experts_after, kept_layers, widths_after
from compressor.plan.route_rules import route_after
from compressor.plan.routing import ROUTE, RouteLayer, RouteRule, RouteStep, RouteWeights
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
)

__all__ = [
    "BITS",
    "PARTS",
    "ROUTE",
    "VERSION",
    "Bits",
    "CacheLayer",
    "CachePolicy",
    "CacheStep",
    "CheckpointStep",
    "DropLayer",
    "DropStep",
    "Estimate",
    "Evidence",
    "ExpertBits",
    "FactorGroup",
    "FactorLayer",
    "FactorStep",
    "GivenUp",
    "LayerKey",
    "LayerShape",
    "LayerValues",
    "MergeGroup",
    "MergeLayer",
    "MergeStep",
    "NewExpert",
    "PlaceLayer",
    "PlaceStep",
    "Plan",
    "Prediction",
    "Prefetch",
    "Protected",
    "Provenance",
    "QuantizeLayer",
    "QuantizeStep",
    "Role",
    "RouteLayer",
    "RouteRule",
    "RouteStep",
    "RouteWeights",
    "ServingStep",
    "SlimExpert",
    "SlimLayer",
    "SlimStep",
    "SmoothLayer",
    "Source",
    "Speed",
    "Step",
    "Target",
    "bits_after",
    "differences",
    "experts_after",
    "group_size_for",
    "json_schema",
    "kept_layers",
    "route_after",
    "stored_bits",
    "widths_after",
]
