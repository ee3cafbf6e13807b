"""The files beside the weights that a result carries on: tokenizer, chat template, settings, code, licence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from compressor.checkpoint.files import INDEX

PLAN, CARD = "moescope_plan.json", "README.md"

_SUFFIXES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab", ".md")
_WORDS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_FOLDERS = ("additional_chat_templates",)
_OURS = ("config.json", INDEX, PLAN, CARD)


def companions(source: Path) -> Iterator[Path]:
    """Relative paths of the files to carry on; never weights, whatever their format."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _OURS and not path.name.startswith(".") and _belongs(path):
            yield Path(path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            yield from (Path(path.name) / child.name for child in sorted(path.iterdir()) if child.suffix == ".jinja")


def _belongs(path: Path) -> bool:
    if path.name.endswith(".index.json"):
        return False
    return path.suffix.lower() in _SUFFIXES or path.name.upper().startswith(_WORDS)


def carry(source: Path, target: Path) -> list[str]:
    """Copy them; the names at the top of the result.

    A plan that the source was made with is kept as ``moescope_plan.1.json``, ``moescope_plan.2.json`` and so on.
    """
    names = []
    for path in companions(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, target / path)
        names.append(path.parts[0])
    if (source / PLAN).is_file():
        number = 1 + sum(1 for name in names if name.startswith("moescope_plan."))
        names.append(f"moescope_plan.{number}.json")
        shutil.copyfile(source / PLAN, target / names[-1])
    return sorted(set(names))


def write_durably(path: Path, text: str) -> None:
    """Write a small file, and make it durable."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
