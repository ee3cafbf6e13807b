"""The trace on disk between metrics: what was put is read back, by many threads, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from profiler.headline import spool
from profiler.headline.spool import Spool


def test_arrays_come_back_as_they_were_put() -> None:
    kept, generator = Spool(), np.random.default_rng(0)
    arrays = {
        (layer, block): generator.integers(-1, 99, (7 * block, 3), np.int16) for layer in range(4) for block in range(5)
    }
    arrays[9, 9] = generator.integers(0, 9, (4, 6), np.int16).T  # not contiguous
    assert kept.get((0, 0)) is None
    for key, ids in arrays.items():
        kept.put(key, ids)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(kept.get, [*arrays] * 20))
    for ids, expected in zip(found, [*arrays.values()] * 20, strict=True):
        assert ids is not None and ids.dtype == np.int16
        np.testing.assert_array_equal(ids, expected)


def test_more_than_there_is_room_for_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MAX_BYTES", 100)
    kept = Spool()
    kept.put((0, 0), np.zeros(40, np.int16))
    kept.put((0, 1), np.ones(40, np.int16))
    kept.put((0, 2), np.full(10, 2, np.int16))
    assert kept.get((0, 1)) is None
    assert [kept.get((0, number)).tolist() for number in (0, 2)] == [[0] * 40, [2] * 10]  # type: ignore[union-attr]


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = """
import os, signal, numpy as np
from profiler.headline.spool import Spool
kept = Spool()
kept.put((0, 0), np.zeros(100_000, np.int16))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
