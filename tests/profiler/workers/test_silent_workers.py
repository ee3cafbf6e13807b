"""A worker that says nothing is mentioned, and is not ended: one that hangs looks like a slow batch."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from profiler.workers.crew import Crew, Member
from profiler.workers.job import WorkersJob


def test_silence_is_mentioned_after_two_minutes() -> None:
    joined: Any = SimpleNamespace(ray=SimpleNamespace(put=lambda order: None), workers=2)
    order: Any = SimpleNamespace(about={"name": "run"}, generate=0)
    corpus: Any = SimpleNamespace(num_tokens=100)
    job = WorkersJob(joined, order, corpus, [], Path(), None, 1, None)
    crew = Crew(joined, order)
    assert job._state(crew).detail == "0 of 2 workers, 0 of 0 parts"
    crew.members = [Member(None, None, ready=True), Member(None, None, ready=True, heard=time.monotonic() - 110)]
    assert job._state(crew).detail == "2 of 2 workers, 0 of 0 parts"
    crew.members.append(Member(None, None, heard=time.monotonic() - 900))  # waits for room, or loads the model
    assert "silent" not in job._state(crew).detail
    crew.members[1].heard -= 70
    assert job._state(crew).detail == "2 of 2 workers, one silent for 3 min, 0 of 0 parts"
