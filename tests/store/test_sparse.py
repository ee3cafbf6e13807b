"""A few sequences of many, found through the index, are what a scan finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import store
from moescope.errors import StoreError
from store import sparse
from tests.app.synthetic import finished

FEW = [31, 4, 17]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("sparse"), metrics=False, sequences=40)


def asked(run: store.Run) -> list[np.ndarray | None]:
    found: list[np.ndarray | None] = []
    for layer in run.layers:
        of = {"layer": layer.layer, "step": layer.step, "sequences": FEW}
        for more in ({}, {"weights": True}, {"first": 10, "last": 20}):
            one = run.layer_selections(**of, **more)
            found += [one.ids, one.weights, one.sequences, one.offsets, one.rounding]
    trace = run.selections(sequences=FEW)
    some = run.selections(sequences=FEW, layers=[run.layers[1].layer])
    return [*found, trace.ids, trace.weights, trace.sequences, some.ids]


def test_through_the_index_as_by_scan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.open_run(path) as run, store.open_run(path) as scanned:
        assert run._sparse.suits(FEW) and not run._sparse.suits(range(6)) and not run._sparse.suits([])
        monkeypatch.setattr(scanned._sparse, "suits", lambda sequences: False)
        for mine, theirs in zip(asked(run), asked(scanned), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_what_is_kept_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.open_run(path) as run:
        with monkeypatch.context() as patch:
            assert run._sparse.suits(FEW)
            patch.setattr(sparse, "MOST", 2)
            assert not run._sparse.suits(FEW)
        for number in range(5):
            run._sparse.chunks([number])
        one = next(iter(run._sparse._kept.values())).estimated_size()
        assert len(run._sparse._kept) == 5
        monkeypatch.setattr(sparse, "KEPT_BYTES", 2 * one)
        run._sparse.chunks([7])
        assert list(run._sparse._kept) in ([(4,), (7,)], [(7,)])
        monkeypatch.setattr(sparse, "KEPT_BYTES", 1)
        assert not run._sparse.suits(FEW)


def test_a_summary_says_what_a_list_needs(path: Path) -> None:
    with store.open_run(path) as run, store.open_run(path, summary=True) as listed:
        assert (listed.info, listed.layers, listed.badge) == (run.info, run.layers, run.badge)
        with pytest.raises(StoreError, match="expert_load"):
            listed.table("expert_load")
