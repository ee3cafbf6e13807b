"""docs/caching.md says what the code does: every policy, method, way, word and number that a reader meets."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import get_args

import pytest

import planner.caching
from app.commands import COMMANDS
from compressor.plan import CachePolicy, Prefetch
from planner import serving as serving_module
from planner.cache import setting, trials, verdict, ways
from planner.machine import EFFICIENCY
from planner.machines import LINKS, MACHINES, USABLE
from planner.presets import DEFAULT_QUANTIZER
from planner.recommendation import CARE
from planner.simulate.bounds import bounds
from planner.simulate.controls import CONTROLS, Decomposition, control
from planner.simulate.policies.registry import POLICIES, Policy
from planner.simulate.prefetch import METHODS
from planner.simulate.timeline import Fallback
from tests.planner.collected import ROOT

DOCS = (ROOT / "docs" / "caching.md").read_text(encoding="utf-8")
PROSE = " ".join(DOCS.split())
CHAPTERS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", DOCS, flags=re.MULTILINE | re.DOTALL))
SECTIONS = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", CHAPTERS["Policies"], flags=re.MULTILINE | re.DOTALL))


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")


def rows(chapter: str) -> list[list[str]]:
    """Cells of the tables of a chapter, without their heads."""
    lines = re.findall(r"^\|(.+)\|$", CHAPTERS[chapter], flags=re.MULTILINE)
    found = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [cells for at, cells in enumerate(found) if "---" not in cells[0] and "---" not in
            (found[at + 1][0] if at + 1 < len(found) else "")]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.name)
def test_every_policy_has_its_section(policy: Policy) -> None:
    section = SECTIONS[policy.title]
    assert anchor(policy.title) == policy.docs_anchor
    lines = " ".join(section.split()).split(" - ")
    wanted = f"Policy: `{policy.name}`; needs: {', '.join(policy.needs)}"
    wanted += "; fitted" if policy.fitted else ""
    wanted += "; a bound: it knows the future" if policy.bound else ""
    assert section.strip().startswith(f"- {wanted}\n")
    assert f"\n- Source: {policy.source}\n" in section
    assert (f"\n- Engine: {policy.engine}\n" in section) == bool(policy.engine)
    assert ("\n- Differs from what was published: " in section) == policy.differs
    assert len(lines) >= 2 and len(section.split("\n\n")) >= 3  # and what it does, in words


def test_sections_stand_in_the_order_of_the_policies() -> None:
    assert list(SECTIONS) == [one.title for one in POLICIES]
    assert set(get_args(CachePolicy)) <= {one.name for one in POLICIES}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: one.name)
def test_parameters_that_are_named_exist(policy: Policy) -> None:
    known = set(inspect.signature(policy.function).parameters)
    for name in re.findall(r"`(\w+)=", SECTIONS[policy.title]):
        assert name in known
    doc = inspect.getdoc(policy.function)
    assert doc and ("not verified" in doc) <= ("not verified" in SECTIONS[policy.title])


def test_every_prefetch_method_has_its_row() -> None:
    found = {cells[0].strip("`"): cells for cells in rows("Prefetching")}
    assert list(found) == [one.name for one in METHODS]
    for one in METHODS:
        assert found[one.name][-1] == one.source
    assert set(get_args(Prefetch)) - {"none"} <= set(found)
    chapter = CHAPTERS["Prefetching"]
    for one in METHODS:
        assert chapter.count(f"`{one.name}`") >= (2 if one.drawn else 1)  # drawn ones are told apart
    assert "somewhat flattering" in chapter and "it saves none" in chapter


def test_every_way_has_its_row() -> None:
    found = {cells[0]: cells[-1] for cells in rows("Ways to serve")}
    known = (*ways.WAYS, ways.RESIDENT)
    assert list(found) == [one.title for one in known]
    assert all((found[one.title] == "yes") == one.needs_trace for one in known)


def test_words_of_answers_are_explained() -> None:
    assert [cells[0] for cells in rows("The verdict")] == list(get_args(verdict.Word))
    assert [cells[0] for cells in rows("The memory planner")] == list(get_args(serving_module.Word))


def test_bounds_and_controls_are_those_that_are_computed() -> None:
    hit_rates = CHAPTERS["Hit rates"]
    names = inspect.signature(bounds).parameters["names"].default
    assert {cells[0].strip("`") for cells in rows("Hit rates")} == {*names, *CONTROLS} and len(CONTROLS) == 3
    assert all(f"``{name}``" in (control.__doc__ or "") for name in CONTROLS)
    for name in Decomposition.__dataclass_fields__:
        assert name in hit_rates
    assert all(f"`{name}`" in CHAPTERS["Time"] for name in set(get_args(Fallback)) - {"link", "cpu"})


def test_numbers_are_those_of_the_code() -> None:
    assert f"about {setting.STEPS:,} steps" in PROSE and f"recommend` {serving_module.STEPS:,} for" in PROSE
    assert f"`--context` ({setting.CONTEXT})" in PROSE
    assert f"times {EFFICIENCY}**" in PROSE and f"{round(10 * USABLE)}/10 of a device's memory" in PROSE
    assert f"at most {verdict.GAIN} of the time" in PROSE and f"`--quality` ({CARE} nats per token)" in PROSE
    assert f"at most {round(100 * (serving_module.HARDLY - 1))} % slower" in PROSE
    equal = ", ".join(str(near) for near, far in trials.PAIRS if near == far)
    mixed = ", ".join(f"{near} + {far}" for near, far in trials.PAIRS if near != far)
    assert f"{equal} bits for all" in PROSE and f"{mixed} bits for experts that stay on the device" in PROSE
    average = ", ".join(f"{bits:g}" for bits in trials.MIXED)
    assert f"{average} bits on average" in PROSE and f"by `{DEFAULT_QUANTIZER}`" in PROSE
    assert all(f"`{name}`" in CHAPTERS["The memory planner"] for name in serving_module.PREFETCHES)
    for one in MACHINES.values():
        assert not one.shares_memory or one.name in CHAPTERS["Machines"]
    assert "`unified`" in CHAPTERS["Machines"] and "unified" in LINKS


def test_what_is_linked_and_named_exists() -> None:
    titles = re.findall(r"^#+ (.+)$", DOCS, flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", DOCS):
        if target.startswith("#"):
            assert target[1:] in {anchor(title) for title in titles}
        else:
            assert (ROOT / "docs" / target).is_file()
    contents = re.findall(r"\[([^\]]+)\]\(#[^)]+\)", " ".join(DOCS.split("\n## ")[0].split()))
    assert list(CHAPTERS) == [title for title in contents if title in CHAPTERS]
    commands = {one.NAME for one in COMMANDS}
    for name in re.findall(r"^moescope ([\w-]+)", DOCS, flags=re.MULTILINE):
        assert name in commands
    for module in re.findall(r"`(planner\.\w+(?:\.\w+)*)`", DOCS):
        head, _, last = module.rpartition(".")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(head), last)
    for path in re.findall(r"(benchmarks[./]\w+)(?:\.py)?`", DOCS):
        assert (ROOT / f"{path.replace('.', '/')}.py").is_file()
    assert callable(planner.caching.study) and callable(serving_module.serving)


def test_it_can_be_read() -> None:
    lines = DOCS.splitlines()
    assert 250 <= len(lines) <= 420
    assert all(len(line) <= 125 or line.startswith("|") for line in lines)
