"""The published values are complete, and the printed tables agree with what was recovered from the figures."""

from __future__ import annotations

import pytest

from profiler.metrics.published import published_hit_rates, published_srp


def test_complete() -> None:
    srp, hits = published_srp(), published_hit_rates()
    models = {one.model for one in srp}
    assert len(models) == 22  # 20 models, of which two count encoder and decoder apart
    assert models == {one.model for one in hits}
    assert {one.segment_length for one in srp} == {4, 16, 64, 256}
    assert len(srp) == 22 * 4 - 1  # the Switch decoder's sequences are shorter than 256 tokens
    assert len(hits) == 22 * 7 * 3
    assert all(0 < one.value < 1 and 0 < one.router_size < 5 for one in srp)
    assert all(0 < one.value < 1 and (one.policy == "sch") == (one.segment_length is not None) for one in hits)
    assert sum(one.loss is None for one in srp) == 15


def test_values() -> None:
    srp = {(one.model, one.segment_length): one for one in published_srp()}
    assert srp["OLMoE-1B-7B-0125", 16].value == pytest.approx(0.5091)
    assert srp["OLMoE-1B-7B-0125", 16].router_size == 1.06
    assert srp["Qwen1.5-MoE-A2.7B", 256].loss == 1.732


@pytest.mark.parametrize(
    ("model", "intervals"),
    [
        ("OLMoE-1B-7B-0125", [(71.27, 72.46), (73.39, 74.71), (65.74, 67.42), (61.94, 63.87)]),
        ("Qwen3-30B-A3B", [(72.86, 73.78), (76.49, 77.46), (68.14, 69.46), (62.91, 64.55)]),
        ("DeepSeek-V2-Lite", [(55.16, 56.00), (57.65, 58.49), (47.04, 47.96), (41.98, 42.99)]),
        ("Qwen1.5-MoE-A2.7B", [(40.67, 41.47), (45.79, 46.50), (34.73, 35.50), (29.45, 30.32)]),
        ("LLaMA-MoE-v2-3.8B", [(96.88, 97.17), (97.82, 98.03), (97.28, 97.58), (96.64, 97.01)]),
    ],
)
def test_recovered_hit_rates_lie_in_the_printed_intervals(model: str, intervals: list[tuple[float, float]]) -> None:
    found = {one.segment_length: one for one in published_hit_rates() if (one.model, one.ratio) == (model, 2.0)}
    for length, (low, high) in zip((4, 16, 64, 256), intervals, strict=True):
        one = next(o for o in published_hit_rates() if (o.model, o.segment_length, o.ratio) == (model, length, 2.0))
        assert low / 100 - one.precision <= one.value <= high / 100 + one.precision
    assert found
