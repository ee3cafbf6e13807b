"""Where experts lie while a model runs: slots, pins, tiers, policy and prefetching, and whether caching pays at all."""
