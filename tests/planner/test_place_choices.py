"""Files of choices for unequal devices: what they say, what they leave out, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from moescope.errors import PlanError
from planner.place.choices import parse
from planner.place.heterogeneous import assign

CONTENT: dict[str, Any] = {
    "variants": ["whole", "int4"], "domains": ["chat", "code", "law"], "devices": ["server", "laptop"],
    "loss": [[1.9, 1.2, 1.5], [2.0, 1.3, 1.7]], "memory": [32, 9], "latency": [[0.02, None], [0.015, 0.06]],
}  # fmt: skip


def test_what_is_left_out_has_its_default() -> None:
    found = parse(json.dumps(CONTENT))
    np.testing.assert_array_equal(found.latency, [[0.02, math.inf], [0.015, 0.06]])
    assert found.energy.shape == (2, 2) and not found.energy.any() and found.share.tolist() == [1, 1, 1]
    for name, length in (("latency_limit", 3), ("energy_limit", 2), ("memory_limit", 2)):
        assert getattr(found, name).tolist() == [math.inf] * length
    assert (found.variants, found.devices) == (("whole", "int4"), ("server", "laptop"))
    assert assign(found).variant == (0, 0, 0)


def test_limits_are_read() -> None:
    content = {"memory_limit": [None, 9], "energy": [[1, 1], [1, 1]], "energy_limit": [1.5, None], "share": [1, 1, 2]}
    found = assign(parse(json.dumps(CONTENT | content)))
    # Of its 1.5 joules the server can spend 1 on chat or on code, and not the 2 of law; int4 loses as much on either.
    assert found.device[2] == 1 and sorted(found.device[:2]) == [0, 1] and found.energy[0] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 1}, "have no entry 'speed': there are variants, domains"),
        ({"loss": None}, "loss is null"),
        ({"variants": []}, "give a list of names"),
        ({"devices": ["a", "a"]}, "name each once"),
        ({"loss": [[1, 2], [1, 2]]}, r"loss does not have 2 \(variants\) rows of 3 \(domains\) numbers"),
        ({"memory": [1]}, r"memory does not have 2 \(variants\) numbers"),
        ({"memory": 3}, r"memory does not have 2 \(variants\) numbers"),
        ({"memory": [1, None]}, "memory holds null: give numbers of 0 or more"),
        ({"latency": [["fast", 1], [1, 1]]}, 'latency holds "fast": give numbers of 0 or more or null'),
        ({"share": [1, True, 1]}, "share holds true"),
        ({"memory": [1, -1]}, "memory holds -1"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse(json.dumps(CONTENT | changes))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "no JSON"), ("[]", "are a list"), ("{}", "lack variants, domains")]
)
def test_what_is_no_file_of_choices(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse(text)
