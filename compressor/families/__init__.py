"""What the modules of each MoE family look like, written once; capture and the compression backend both read it.

Nothing here imports torch: modules are described by the attributes that they carry.
"""

from compressor.families.adapters import ADAPTERS, FUSED, Adapter, adapter_of
from compressor.families.calls import Call, Routed, Selection, flat, read_call, read_router, read_sequences, routed
from compressor.families.expert_map import EXPERT_MAP, ExpertMap, expert_map_of, takes_expert_map
from compressor.families.layout import ExpertKind, ExpertsLayout, describe_experts, is_fused_experts, stacked_layout
from compressor.families.refusals import Refusal, left_out_reason, refusal_of
from compressor.families.routers import RouterTraits, Score, find_router_outputs, router_traits
from compressor.families.separate import SeparateLayout, separate_layout
from compressor.families.shared import SharedExperts, find_shared_experts

__all__ = [
    "ADAPTERS",
    "EXPERT_MAP",
    "FUSED",
    "Adapter",
    "Call",
    "ExpertKind",
    "ExpertMap",
    "ExpertsLayout",
    "Refusal",
    "Routed",
    "RouterTraits",
    "Score",
    "Selection",
    "SeparateLayout",
    "SharedExperts",
    "adapter_of",
    "describe_experts",
    "expert_map_of",
    "find_router_outputs",
    "find_shared_experts",
    "flat",
    "is_fused_experts",
    "left_out_reason",
    "read_call",
    "read_router",
    "read_sequences",
    "refusal_of",
    "routed",
    "router_traits",
    "separate_layout",
    "stacked_layout",
    "takes_expert_map",
]
