"""Which expert makes room: every policy by name, one file per family. docs/caching.md says what each is.

A new policy is a function ``name(job, **parameters) -> Served`` in a file of this folder and a line in ``registry.py``.
"""

from __future__ import annotations

from planner.simulate.policies.registry import POLICIES, Policy, policy

__all__ = ["POLICIES", "Policy", "policy"]
