"""Switch experts off without telling the router, and measure what that does beside controls.

Importing this loads no torch; :func:`profiler.ablation.measure.ablate` does.

::

    from profiler.ablation import parse_experts
    from profiler.ablation.measure import ablate

    found = ablate(model, corpus.batches, experts=parse_experts("1:68,2:92,3:82"))
    found.verdict.sentence
"""

from profiler.ablation.experts import Expert, parse_experts

__all__ = ["Expert", "parse_experts"]
