"""Local routing consistency: whether a small set of experts serves a stretch of text, and what caching them would
hit.

The public face of ``segment_routing`` (SRP) and ``cache_hit_rate`` (SCH, LRU, LFU, Belady)::

    srp(selections=ids, num_experts=64, segment_length=16).value
    hit_rate_curve(selections=ids, num_experts=64, policy="sch", segment_length=16)[layer, slots - 1]
"""

from __future__ import annotations

from ._intervals import Rule
from .cache_hit_rate import (
    CachePolicy,
    Convention,
    HitRateInterval,
    HitSums,
    hit_rate_bootstrap,
    hit_rate_curve,
    shared_requests,
    slots_at_ratio,
)
from .segment_routing import (
    Scope,
    SegmentRouting,
    SegmentRoutingInterval,
    srp,
    srp_bootstrap,
    srp_bootstrap_table,
    srp_expert_choice,
    srp_table,
    srp_uniform,
)

__all__ = [
    "CachePolicy",
    "Convention",
    "HitRateInterval",
    "HitSums",
    "Rule",
    "Scope",
    "SegmentRouting",
    "SegmentRoutingInterval",
    "hit_rate_bootstrap",
    "hit_rate_curve",
    "shared_requests",
    "slots_at_ratio",
    "srp",
    "srp_bootstrap",
    "srp_bootstrap_table",
    "srp_expert_choice",
    "srp_table",
    "srp_uniform",
]
