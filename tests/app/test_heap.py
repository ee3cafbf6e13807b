"""Full collections stay short however much the process holds, and nothing set aside is kept for good; freed memory
goes back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import weakref
from collections.abc import Iterator

import pytest

from app import heap
from tests.loops import in_own_loop


class Node:
    """Something that can be in a ring."""

    ring: Node


@pytest.fixture
def watched() -> Iterator[None]:
    before = list(gc.callbacks)
    heap.keep_collections_short()
    heap.keep_collections_short()
    assert len(gc.callbacks) == len(before) + 1
    yield
    gc.callbacks[:] = before
    gc.unfreeze()


def test_survivors_are_set_aside_and_looked_through_again(watched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "LONG", 0.0)
    held = [Node() for _ in range(100_000)]
    gc.collect()
    assert gc.get_freeze_count() >= len(held)
    assert len(gc.get_objects()) < len(held)  # what the next collection looks at
    held[0].ring = held[0]
    gone = weakref.ref(held[0])
    held.clear()
    gc.collect()
    assert gone() is not None  # a ring among what was set aside
    monkeypatch.setattr(heap, "THOROUGH", -1.0)
    gc.collect()
    assert gone() is None


def test_freed_memory_is_given_back_until_the_server_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    library = type("Library", (), {"malloc_trim": staticmethod(trims.append)})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(heap, "GIVE_BACK", 0.001)

    async def some_time() -> None:
        giving = asyncio.create_task(heap.give_back())
        while len(trims) < 3:
            await asyncio.sleep(0.001)
        giving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await giving

    in_own_loop(asyncio.wait_for(some_time(), 10))
    assert set(trims) == {0}


def test_a_library_that_cannot_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    in_own_loop(asyncio.wait_for(heap.give_back(), 10))
