"""Ten kills of each kind of work; ``make faults`` does two hundred."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_kills_lose_nothing() -> None:
    # A process of its own: this one has threads, which a fork would leave behind.
    command = [sys.executable, "-m", "tests.faults", "--kills", "10", "--seed", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    kinds = [line.split()[0] for line in ended.stdout.splitlines() if "10 kills, 0 did harm" in line]
    assert sorted(kinds) == ["apply", "collect", "compaction", "report"]
