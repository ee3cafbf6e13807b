"""What the modules of each MoE family look like, written once; capture and the compression backend both read it.

Nothing here imports torch: modules are described by the attributes that they carry.
"""

from compressor.families.adapters import ADAPTERS, adapter_of
from compressor.families.layout import ExpertsLayout, describe_experts, is_fused_experts
from compressor.families.refusals import Refusal, refusal_of
from compressor.families.routers import RouterTraits, Score, find_router_outputs, router_traits
from compressor.families.shared import SharedExperts, find_shared_experts

__all__ = [
    "ADAPTERS",
    "ExpertsLayout",
    "Refusal",
    "RouterTraits",
    "Score",
    "SharedExperts",
    "adapter_of",
    "describe_experts",
    "find_router_outputs",
    "find_shared_experts",
    "is_fused_experts",
    "refusal_of",
    "router_traits",
]
