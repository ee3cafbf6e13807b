"""Rules as they are typed, what is refused, how the text is divided, and the verdict; no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moescope.errors import CorpusError, InputError
from profiler.corpus import TokenBatch
from profiler.sweep.report import verdict
from profiler.sweep.text import divide
from profiler.sweep.trials import Trial, default_trials, parse_rules, redundancy_trials, require_sense


def test_rules_are_read_as_they_are_typed() -> None:
    found = parse_rules(["top_p=0.3, 0.4", "ratio=.1,odp", "top_k=2,2", "shared=off"], weights="kept")
    assert [one.name for one in found] == [
        *("top_p=0.3, weights kept", "top_p=0.4, weights kept", "ratio=0.1, weights kept", "ratio=odp, weights kept"),
        *("top_k=2, weights kept", "shared=off, weights kept"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("top_q=1", "there are top_k"), ("top_p", "give values"), ("top_p=", "give values"), ("top_p=x", "no number"),
        ("top_p=1.2", "0 to 1"), ("top_k=1.5", "whole numbers"), ("top_k=0", "whole numbers"), ("threshold=-1", "0 to"),
        ("ratio=nan", "0 to 1"), ("shared=on", "there are off"), ("plan=x", "there are top_k"), ("top_p=odp", "number"),
    ],
)  # fmt: skip
def test_rules_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse_rules([text])


def test_defaults_fit_the_router() -> None:
    ks = {k: [one.value for one in default_trials(k, 16) if one.rule == "top_k"] for k in (1, 2, 8)}
    assert ks == {1: [1, 2], 2: [1, 2, 3, 4], 8: [1, 2, 4, 6, 8, 9, 10, 12, 16]}
    assert {one.rule for one in default_trials(1, 16)} == {"top_k"}
    for top_k in (1, 2, 8):
        require_sense(default_trials(top_k, 16), top_k=top_k, num_experts=16, shared=False)
        require_sense(redundancy_trials(shared=True, top_k=top_k, num_experts=16), top_k=top_k, num_experts=16,
                      shared=True)  # fmt: skip


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        (Trial("top_p", 0.5), "none to leave out"), (Trial("top_k", 9.0), "has 8 experts"),
        (Trial("mask_top", 1.0), "would be left"), (Trial("shared", "off"), "no shared experts"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(trial: Trial, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        require_sense([trial], top_k=1, num_experts=8, shared=False)


def text(lengths: list[int], domains: list[str]) -> list[TokenBatch]:
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return [TokenBatch(ids, mask, mask == 2, np.arange(len(lengths)), domains, [""] * len(lengths))]


def test_calibration_shares_no_sequence_with_what_is_judged() -> None:
    found = divide(text([9, 4, 3, 5, 2, 6, 7, 3], list("aaaaaabc")), share=0.2)
    judged, apart = (
        [int(one) for batch in part for one in batch.sequences] for part in (found.judged, found.calibration)
    )
    assert apart == [0, 1] and judged == [2, 3, 4, 5, 6, 7] and found.domains == ["a", "b", "c"]
    assert found.tokens == 26 and found.calibration_tokens == 13 and found.judged[0].input_ids.shape[1] == 7
    assert not divide(text([9, 4], ["a", "b"]), share=0.5).calibration
    with pytest.raises(InputError, match="--calibration"):
        divide([], share=1.0)
    with pytest.raises(CorpusError, match="nothing to predict"):
        divide(text([1, 1], ["a", "a"]))


def row(rule: str, value: float, share: float, change: tuple[float, float | None, float | None]) -> dict[str, Any]:
    ends = dict(zip(("value", "low", "high"), change, strict=True))
    return {"rule": rule, "value": value, "weights": "renormalized", "change": ends,
            "routing": {"all": {"flops_share": share}}}  # fmt: skip


def test_the_verdict_says_no_where_the_interval_does_not_exclude_it() -> None:
    assert verdict({"rules": []}) == "No rule was tried."
    unsure = row("ratio", 0.3, 0.7, (0.004, -0.001, 0.02))
    assert verdict({"rules": [unsure]}).startswith("No: every rule that saves experts costs more than 1 %")
    assert verdict({"rules": [row("ratio", 0.3, 0.7, (0.004, None, None))]}).startswith("No:")
    sure = row("ratio", 0.1, 0.9, (0.004, 0.001, 0.009))
    more = row("top_k", 4.0, 2.0, (-0.02, -0.03, -0.01))
    said = verdict({"rules": [unsure, sure, more, row("mask_top", 0.1, 0.5, (0.0, 0.0, 0.0))]})
    assert said.startswith("Yes: ratio=0.1 leaves 90% of the experts' FLOPs") and "2 rules save" in said
    assert "top_k=4 predicts it better" in said
    assert "No rule predicts the text better" in verdict({"rules": [sure]})
