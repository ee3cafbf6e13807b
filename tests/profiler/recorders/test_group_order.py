"""Sums of a batch do not depend on which domains and phases the process saw before it."""

from __future__ import annotations

import polars as pl
import torch
from polars.testing import assert_frame_equal

from profiler.capture.batch import RoutingBatch, Tokens
from profiler.recorders.router import RouterRecorder


def tables(groups: list[tuple[str, str]], owner: list[tuple[str, str]]) -> dict[str, pl.DataFrame]:
    torch.manual_seed(0)
    tokens, experts, k = len(owner), 16, 2
    logits = torch.randn(2, tokens, experts)
    weights, ids = logits.softmax(-1).topk(k)
    group = torch.tensor([groups.index(one) for one in owner])
    place = torch.arange(tokens)
    mine = Tokens(place, place, group, groups, tokens, None, place, present=sorted(set(group.tolist())))
    recorder = RouterRecorder()
    recorder.update(RoutingBatch([(0, 0), (1, 0)], mine, experts, ids, weights, logits, "softmax"))
    return recorder.drain()


def test_router_sums_are_the_same_to_the_bit_whatever_came_first() -> None:
    groups = [(domain, phase) for domain in "abcde" for phase in ("prompt", "decode")]
    owner = [groups[token * token % 10] for token in range(301)]
    first, other = tables(groups, owner), tables([("z", "prompt"), *groups[::-1]], owner)
    for name, frame in first.items():
        keys = [column for column, kind in frame.schema.items() if not kind.is_float()]
        assert_frame_equal(frame.sort(keys), other[name].sort(keys), check_exact=True)
