"""Presets and docs/plan.md say the same, and what they name exists."""

from __future__ import annotations

import inspect
import re

import pytest

import store
from planner.presets import DEFAULT, PRESETS, Preset, find
from tests.planner.collected import ROOT

DOCS = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
SECTIONS = {
    re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-"): text
    for title, text in re.findall(r"^### (.+)\n([^#]*(?:\n(?!#).*)*)", DOCS, flags=re.MULTILINE)
}
CHAPTERS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", DOCS, flags=re.MULTILINE | re.DOTALL))


def _parameters(preset: Preset) -> list[str]:
    signature = inspect.signature(preset.function).parameters.values()
    return [one.name for one in list(signature)[1:] if one.kind is not inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda one: one.name)
def test_every_preset_has_its_section(preset: Preset) -> None:
    section = f"\n{SECTIONS[preset.docs_anchor]}"
    forms = ", ".join(preset.forms)
    assert f"\n- Step: {preset.step}; level: {preset.level}; forms: {forms}\n" in section
    defaults = ", ".join(f"{name}={value}" for name, value in preset.defaults.items()) or "none"
    others = [name for name in _parameters(preset) if name not in (*preset.defaults, "what", "score")]
    also = f"; also {', '.join(others)}" if others else ""
    assert f"\n- Defaults: {defaults}{also}\n" in section
    assert f"\n- Source: {preset.source}\n" in section
    assert ("\n- Differs from what was published: " in section) == preset.differs


def test_sections_stand_in_the_order_of_the_presets() -> None:
    assert list(SECTIONS) == [one.docs_anchor for one in PRESETS]
    assert len({one.name for one in PRESETS}) == len(SECTIONS) == len(PRESETS)
    for preset in PRESETS:
        assert f"### {preset.title}\n" in CHAPTERS[preset.step.capitalize()]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda one: one.name)
def test_presets_name_what_exists(preset: Preset) -> None:
    assert preset.function.__name__ == "draft" and preset.function.__doc__
    module = inspect.getmodule(preset.function)
    assert module is not None and module.__doc__
    if "score" not in preset.defaults:
        assert set(preset.defaults) <= set(_parameters(preset))
    meanings = " ".join(table.meaning for table in store.tables().values())
    assert all(re.search(f"Level {level}[.;]", meanings) for level in preset.wanted.split(","))
    assert set(preset.forms) <= {"uniform", "per_layer", "padded", "shared", "masked", "dense", "packed"}
    assert "masked" not in preset.forms or preset.step == "slim"


def test_presets_are_found_by_name() -> None:
    assert find(DEFAULT) in PRESETS and find("heapr").level == "gradients"
    with pytest.raises(TypeError):
        find("reap").defaults["score"] = "ean"  # type: ignore[index]
