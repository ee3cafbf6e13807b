"""The document: the same bytes for the same plan, read back as it was, and hostile ones refused with one line."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.plan import Plan, json_schema
from compressor.plan.schema import schema_text
from moescope.errors import PlanError
from tests.compressor.planned import plan
from tests.compressor.test_plan_rules import GOOD, SUPER, drop

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", GOOD)
def test_round_trip(name: str, tmp_path: Path) -> None:
    steps, changes = GOOD[name]
    made = plan(*steps, **changes)
    made.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == made and read.text() == made.text() and read.digest == made.digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    assert "日本語" in (tmp_path / "plan.json").read_text(encoding="utf-8")


def test_another_process_writes_the_same_bytes() -> None:
    code = (
        "from tests.compressor.test_plan_rules import drop, SUPER\n"
        "from tests.compressor.planned import plan\n"
        "print(plan(drop(0, 3), protected=(SUPER,)).digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    assert done.stdout.strip() == plan(drop(0, 3), protected=(SUPER,)).digest


def test_a_plan_never_changes() -> None:
    made = plan(drop(0))
    with pytest.raises(ValueError, match="frozen"):
        made.version = 2  # type: ignore[misc, assignment]


def test_the_published_schema_is_the_models() -> None:
    assert (ROOT / "docs" / "plan.schema.json").read_text(encoding="utf-8") == schema_text()
    schema = json_schema()
    assert schema["additionalProperties"] is False
    named = set(schema["$defs"])
    assert {"DropStep", "MergeStep", "SlimStep", "Estimate", "Evidence", "Provenance", "Source", "Target"} <= named


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no plan"),
        ("{", "is no plan"),
        ("[]", "has no steps"),
        ('{"a": 1}', "has no steps"),
        ("[" * 100_000, "is no plan"),
        ('{"steps": [], "version": 2}', "has version 2; this moescope reads 1"),
        ('{"steps": [], "version": 1}', "no plan that can be followed"),
        ('{"steps": [], "version": "1"}', "has version '1'"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        Plan.parse(text)


def _changed(path: tuple[Any, ...], value: Any) -> str:
    content = json.loads(plan(drop(0, 3)).text())
    place = content
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("source", "num_layers"), 10**18, "less than or equal to 4096"),
        (("source", "layers", 0, "num_experts"), 10**12, "less than or equal"),
        (("source", "layers", 0, "groups"), 0, "greater than or equal"),
        (("source", "layers"), [], "at least 1 item"),
        (("steps", 0, "step"), "explode", "explode"),
        (("steps", 0, "layers", 0, "experts"), [3, 0], "numbers must ascend"),
        (("steps", 0, "layers", 0, "experts"), [0, 0], "numbers must ascend"),
        (("steps", 0, "layers", 0, "experts"), [-1], "numbers must ascend"),
        (("steps", 0, "layers", 0, "experts"), "0", "array"),
        (("target", "share"), 1.5, "less than 1"),
        (("estimate", "kept_mass"), float("nan"), "finite"),
        (("estimate", "layer_error"), float("inf"), "finite"),
        (("surprise",), 1, "Extra inputs"),
        (("steps", 0, "path"), "/etc/passwd", "Extra inputs"),
    ],
)
def test_hostile_values_are_refused(path: tuple[Any, ...], value: Any, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence) as raised:
        Plan.parse(_changed(path, value), "plan.json")
    assert str(raised.value).startswith("plan.json")


def test_weights_that_are_no_numbers_are_refused() -> None:
    content = json.loads(plan(*GOOD["merge"][0]).text())
    content["steps"][0]["layers"][0]["groups"][0]["weights"] = [float("nan"), float("nan")]
    with pytest.raises(PlanError, match="finite"):
        Plan.parse(json.dumps(content))


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.json", tmp_path / "latin.json", tmp_path):
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.load(path)
    with pytest.raises(PlanError, match="cannot be written"):
        plan(drop(0)).save(tmp_path / "nowhere" / "plan.json")


_DOCUMENTS = [json.loads(plan(*steps, **changes).text()) for steps, changes in GOOD.values()]
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 20), st.sampled_from([10**9, 10**30, -1.5, 0.3, "", "uniform", "AAAA"]),
    st.lists(st.integers(-2, 9), max_size=4), st.just({}),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_change_is_a_plan_or_one_line(data: st.DataObject) -> None:
    """Whatever value stands anywhere: a checked plan, or a PlanError."""
    content = copy.deepcopy(data.draw(st.sampled_from(_DOCUMENTS)))
    place: Any = content
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = data.draw(st.sampled_from(list(keys)))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.integers(0, 4)) == 0:
            break
        place = inner
    place[key] = data.draw(_VALUES)
    with contextlib.suppress(PlanError):
        Plan.parse(json.dumps(content))
