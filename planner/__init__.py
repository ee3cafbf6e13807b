"""Turns a run into plans: what to drop, merge, slim, quantize, factor, cache, place or route, and why."""
