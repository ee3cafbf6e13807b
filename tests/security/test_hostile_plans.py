"""Plans made to harm: one short line, in bounded time, whatever a document holds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.cli import main
from compressor.plan import Plan, reading
from moescope.errors import PlanError
from tests.compressor.planned import plan
from tests.compressor.test_plan_rules import GOOD


def document(**route: Any) -> dict[str, Any]:
    """A sound plan with one route step of one layer."""
    content: dict[str, Any] = json.loads(plan(*GOOD["drop"][0]).text())
    layer = {"layer": 1, **route}
    content["steps"] = [{"step": "route", "method": "test", "rule": "bias" if "bias" in route else "top_k"}]
    content["steps"][0]["layers"] = [layer]
    return content


def routed(value: str) -> str:
    """The same with a value as it is typed here."""
    return json.dumps(document(value=2)).replace('"value": 2', f'"value": {value}')


def many_layers(count: int) -> str:
    content = document(value=2)
    shape = content["source"]["layers"][0]
    content["source"] |= {"num_layers": count, "layers": [shape | {"layer": number} for number in range(count)]}
    return json.dumps(content)


def named(text: str) -> str:
    """The plan with another method, as it is escaped here."""
    return json.dumps(document(value=2)).replace('"method": "test"', f'"method": "{text}"')


HOSTILE = {
    "huge": (lambda: routed("1e308"), "asks for 1e[+]308"),
    "beyond": (lambda: routed("1e400"), "finite"),
    "minus nothing": (lambda: routed("-0.0"), "-0 is no number of experts"),
    "not a number": (lambda: routed("NaN"), "finite"),
    "long integer": (lambda: routed("1" + "0" * 100), r"asks for 1e[+]100"),
    "longer integer": (lambda: routed("1" * 5000), "4300 digits"),
    "text": (lambda: routed('"2"'), "valid number"),
    "truth": (lambda: routed("true"), "valid number"),
    "nested": (lambda: routed("[" * 100_000 + "]" * 100_000), "recursion"),
    "named": (lambda: routed('{"a":' * 100_000 + "1" + "}" * 100_000), "recursion"),
    "nested less": (lambda: routed("[" * 900 + "]" * 900), "recursion"),
    "twice": (lambda: routed('2, "value": 3'), "'value' stands in it twice"),
    "steps twice": (lambda: json.dumps(document(value=2))[:-1] + ', "steps": []}', "'steps' stands in it twice"),
    "half a character": (lambda: named("\\ud800"), "surrogates"),
    "long name": (lambda: json.dumps(document(value=2) | {"a\n\x1b[2J" + "x" * 10**6: 1}), "Extra inputs|a  ?.2Jx"),
    "long version": (lambda: json.dumps(document(value=2) | {"version": "x\n" * 10**6}), "has version"),
    "long step": (lambda: json.dumps(document(value=2) | {"steps": [{"step": "x\n\u202e" * 10**6}]}), "Input tag"),
    "large bias": (lambda: json.dumps(document(bias=[1e308] * 8)), "beyond 10,000"),
    "long bias": (lambda: json.dumps(document(bias=[0] * 10**6)), "1000000 numbers, and the layer 8"),
    "bias of words": (lambda: json.dumps(document(bias=[""] * 10**6)), "valid number"),
    "layers": (lambda: many_layers(4097), "4096"),
    "large": (lambda: routed("2" + " " * reading.MAX_BYTES), "more than 64 MiB"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_short_line_in_bounded_time(name: str) -> None:
    make, sentence = HOSTILE[name]
    text = make()
    began = time.process_time()
    with pytest.raises(PlanError, match=sentence) as refused:
        Plan.parse(text, "p.json")
    assert time.process_time() - began < 3
    said = str(refused.value)
    assert said.isprintable() and len(said) < 300
    cause = refused.value.__cause__
    assert not isinstance(cause, ValidationError) or cause.error_count() < 10  # not one for each of a million


def test_a_plan_of_many_layers_is_checked_in_bounded_time() -> None:
    """As many as may be stated: nothing is looked for again and again."""
    content = json.loads(many_layers(4096))
    content["steps"][0]["layers"] = [{"layer": number, "value": 2} for number in range(4096)]
    began = time.process_time()
    assert Plan.parse(json.dumps(content)).route is not None
    assert time.process_time() - began < 3


def test_what_is_sound_stays_so() -> None:
    for text in (routed("2"), routed("2.0"), named("\\ud83d\\ude00"), json.dumps(document(bias=[0.5] * 8))):
        read = Plan.parse(text)
        assert Plan.parse(read.text()) == read


def test_a_file_too_large_is_not_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "p.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room on the disk
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("p.json", "zero"):
        assert main(["apply", str(tmp_path / name), str(tmp_path), "-o", str(tmp_path / "out")]) == 2
        assert "more than 64 MiB" in capsys.readouterr().err
