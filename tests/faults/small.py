"""A tiny model on a few words of text, collected for tests of what can go wrong meanwhile; and small disks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import profiler.collect as collect_module
from profiler.capture import session
from profiler.corpus import open_corpus
from tests.profiler.capture.tiny import build, tokenizer

TEXT = "It was a bright cold day in April.\n\ndef f(x):\n    return x + 1\n\n" * 6
TOKENS = 6 * 64


@cache
def _model() -> Any:
    return build("olmoe", num_hidden_layers=2)


def collected(folder: Path, patch: pytest.MonkeyPatch, name: str = "small", **options: Any) -> Path:
    """Collect with a shard after every forward."""
    patch.setattr(session, "WRITING_SHARE", float("inf"))
    patch.setattr(session, "LOSS_SHARE", 0.0)
    text = folder.parent / "text.txt"
    text.write_text(TEXT)
    corpus = open_corpus([text], tokenizer=tokenizer(), sequence_length=32, batch_size=2)
    return collect_module.collect(
        _model(), corpus=corpus, store=folder, name=name, tokenizer=tokenizer(), level="activations", headline=False,
        flush_seconds=0.0, **options,
    )  # fmt: skip


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory at a folder; the test is skipped where nobody may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no command mount")
    if done.returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change the options of a file system that :func:`mounted` gave."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
