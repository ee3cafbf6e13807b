"""Keys of widgets: what a page leaves behind in the session, the next one must be able to read."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2] / "app"
KINDS = {
    "choose": "text", "selectbox": "text", "_choose_kind": "text", "text_input": "text", "text_area": "text",
    "choose_flag": "flag", "toggle": "flag", "checkbox": "flag", "choose_number": "number", "number_input": "number",
    "choose_size": "number", "choose_share": "number", "slider": "number", "choose_some": "list", "multiselect": "list",
}  # fmt: skip


def test_a_key_holds_one_kind_of_value_on_all_pages() -> None:
    kinds: dict[str, set[str]] = defaultdict(set)
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                for word in node.keywords:
                    if word.arg == "key" and isinstance(word.value, ast.Constant) and called in KINDS:
                        kinds[word.value.value].add(KINDS[called])
    assert len(kinds) > 20
    assert {key: found for key, found in kinds.items() if len(found) > 1} == {}
