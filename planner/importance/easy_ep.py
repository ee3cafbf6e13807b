"""EASY-EP: output norms, weighted by the gate and by how far the layer turns the token."""

from __future__ import annotations

import polars as pl

from moescope.errors import PlanError
from planner.importance.expressions import layer_share
from planner.importance.statistics import EXPERT, Statistics


def easy_ep(statistics: Statistics, *, mixed: bool = True) -> pl.DataFrame:
    """Sum over the expert's tokens of s g |f| with s = max(0, 1 - cos(r, r + y)) (arXiv 2504.06792).

    r is the residual stream before the layer's norm, y the routed experts' weighted sum; shared experts are not in it.

    Args:
        statistics: sums of a run; of one domain, the value is the plain sum.
        mixed: over several domains, divide each domain's scores by their sum over the layer and add them up, so that
            no domain counts more because it is longer. False: the plain sum over all tokens.

    Raises:
        PlanError: the residual stream of a layer was not seen.
    """
    domains = statistics.domains_in("expert_output")
    if statistics.domain is not None or not mixed or not domains:
        return _plain(statistics)
    shares = [_plain(statistics.of(domain)).with_columns(value=layer_share("value")) for domain in domains]
    return pl.concat(shares).group_by(EXPERT).agg(pl.col("value").sum()).sort(EXPERT)


def _plain(statistics: Statistics) -> pl.DataFrame:
    output = statistics.experts("expert_output", "tokens", "shifted_tokens", "shifted_gated_norm_sum")
    seen = output.group_by("layer", maintain_order=True).agg(pl.col("tokens", "shifted_tokens").sum())
    for layer, tokens, shifted in seen.iter_rows():
        if shifted < tokens:
            raise PlanError(
                f"run {statistics.run.name!r} saw the residual stream before layer {layer} for {shifted} of {tokens}"
                " selections: easy_ep needs all of them, use reap"
            )
    return output.select(*EXPERT, value=pl.col("shifted_gated_norm_sum"))
