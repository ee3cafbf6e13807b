"""What would happen: caches, prefetching and time, replayed on a recorded trace. No torch.

::

    work = workload_of(run)                                    # one token per forward pass
    done = replay(work, policy="lru", slots=16)                # hits, loads and stalls, per request and layer
    curve = bounds(work)["min_set"]                            # what no policy can beat, at every size
"""

from __future__ import annotations
