"""Collections on the workers of a Ray: deterministic parts, one shard each, equal to what one process writes."""

from profiler.workers.entry import collect_on_ray
from profiler.workers.parts import cut, default_part_tokens

__all__ = ["collect_on_ray", "cut", "default_part_tokens"]
