"""Which experts of a layer belong together, from a run's stored sums: one file per published grouping.

Groupings say who merges with whom and how much each counts; the weights themselves are the compressor's work.
"""

from planner.merge.m_smoe import logit_similarity, m_smoe
from planner.merge.stun import agglomerate, router_distance, stun

__all__ = ["agglomerate", "logit_similarity", "m_smoe", "router_distance", "stun"]
