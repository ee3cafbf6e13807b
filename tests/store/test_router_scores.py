"""Router scores: packed in 16 bits, read back in order, and read by domain and layer like the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import store
from moescope.errors import StoreError
from store.scores import NONE

LENGTHS = {0: 700, 4: 30}
"""Sequences by number: one longer than a chunk, and a gap in the numbers."""

WIDTH = {1: 3, 2: 2}
"""Scores per token by layer: a narrow router has fewer."""


def _truth(layer: int) -> tuple[np.ndarray, ...]:
    generator = np.random.default_rng(layer)
    sequence = np.concatenate([np.full(length, number) for number, length in LENGTHS.items()])
    position = np.concatenate([np.arange(length) for length in LENGTHS.values()])
    logits = -np.sort(-generator.normal(scale=10**layer, size=(len(sequence), WIDTH[layer])))
    ids = generator.integers(0, 300, logits.shape)
    return sequence, position, ids, logits, generator.normal(size=len(sequence))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    writer = store.RunWriter.create(tmp_path_factory.mktemp("scores"), "mine", store.RunInfo(model="toy"))
    frames = []
    for layer in WIDTH:
        sequence, position, ids, logits, totals = _truth(layer)
        ids[5], logits[5], totals[5] = NONE, np.nan, np.nan  # a token with broken logits
        order = np.random.default_rng(9).permutation(len(ids))  # tokens may come in any order
        frames.append(
            store.pack_scores(
                layer=layer,
                sequence=sequence[order],
                position=position[order],
                ids=ids[order],
                logits=logits[order],
                log_partition=totals[order],
            )
        )
    writer.write_shard(
        {
            "score_chunk": pl.concat(frames),
            "layer": {"layer": [1, 2], "step": [0, 0], "num_experts": [300, 300]},
            "sequence": {"sequence": [*LENGTHS], "domain": ["code", "german"], "tokens": [*LENGTHS.values()]},
        }
    )
    return store.open_run(writer.finish(seconds=1.0))


def test_what_was_packed_is_read_back(run: store.Run) -> None:
    scores = run.router_scores()
    assert scores.layers == [(1, 0), (2, 0)] and scores.sequences.tolist() == [0, 4]
    assert scores.ids.shape == scores.logits.shape == (2, 2, 700, 3)
    for axis, layer in enumerate(WIDTH):
        sequence, position, ids, logits, totals = _truth(layer)
        row = (sequence == 4).astype(int)
        sound = np.arange(len(ids)) != 5
        found = scores.ids[axis, row, position][:, : WIDTH[layer]]
        assert_array_equal(found[sound], ids[sound])
        restored = scores.logits[axis, row, position][:, : WIDTH[layer]]
        # One of 65535 steps over the range of a chunk, halved, and the rounding of 32 bits.
        assert_allclose(restored[sound], logits[sound], atol=np.ptp(logits) / 131070 * 1.01 + 1e-5 * 10**layer)
        assert_allclose(scores.log_partition[axis, row, position][sound], totals[sound], rtol=1e-6)
        assert (found[5] == -1).all() and np.isnan(restored[5]).all()
        assert np.isnan(scores.log_partition[axis, 0, 5])
    assert (scores.ids[1, ..., 2] == -1).all() and (scores.ids[:, 1, 30:] == -1).all()


def test_a_part_is_the_part_of_the_whole(run: store.Run) -> None:
    whole, part = run.router_scores(), run.router_scores(domain="german", layers=[2])
    assert part.layers == [(2, 0)] and part.domains == ["german"]
    assert_array_equal(part.ids[0, 0], whole.ids[1, 1, :30, :2])
    assert_array_equal(run.router_scores(sequences=[0]).logits[:, 0], whole.logits[:, 0])
    with pytest.raises(StoreError, match="has no domain 'math'"):
        run.router_scores(domain="math")


def test_a_layer_without_padding(run: store.Run) -> None:
    whole = run.router_scores()
    for axis, layer in enumerate(WIDTH):
        found = run.layer_scores(layer=layer)
        assert found.sequences.tolist() == [*LENGTHS] and found.offsets.tolist() == [0, 700, 730]
        assert found.ids.shape == (730, WIDTH[layer])
        for place, length in enumerate(LENGTHS.values()):
            part = slice(found.offsets[place], found.offsets[place + 1])
            for mine, other in (
                (found.ids, whole.ids[..., : WIDTH[layer]]),
                (found.logits, whole.logits[..., : WIDTH[layer]]),
                (found.log_partition, whole.log_partition),
            ):
                assert_array_equal(mine[part], other[axis, place, :length])
    assert len(run.layer_scores(layer=1, last=3).ids) == 700
    assert len(run.layer_scores(layer=1, sequences=[4]).ids) == 30
    assert run.layer_scores(layer=1, sequences=[3]).ids.shape == (0, 0)
    with pytest.raises(StoreError, match="no MoE layer 3"):
        run.layer_scores(layer=3)


def test_sequences_without_scores_are_not_there(tmp_path: Path) -> None:
    """As ``--scores-every`` leaves them out."""
    sequence, position, ids, logits, totals = _truth(1)
    kept = sequence == 4
    frame = store.pack_scores(
        layer=1, sequence=sequence[kept], position=position[kept], ids=ids[kept], logits=logits[kept],
        log_partition=totals[kept],
    )  # fmt: skip
    writer = store.RunWriter.create(tmp_path, "some", store.RunInfo(model="toy"))
    writer.write_shard(
        {
            "score_chunk": frame,
            "layer": {"layer": [1], "step": [0], "num_experts": [300]},
            "sequence": {"sequence": [*LENGTHS], "domain": ["code", "german"], "tokens": [*LENGTHS.values()]},
        }
    )
    with store.open_run(writer.finish(seconds=1.0)) as run:
        scores = run.router_scores()
        assert scores.sequences.tolist() == [4] and scores.ids.shape == (1, 1, 30, 3) and (scores.ids >= 0).all()
        assert run.router_scores(domain="code").ids.shape[:3] == (1, 0, 0)
        assert run.layer_scores(layer=1).sequences.tolist() == [4]
        assert run.scored_sequences.rows() == [(4, "german", 30)]
        with pytest.raises(StoreError, match="no router scores of sequence 0"):
            run.stretch_scores(0)
        assert run.stretch_scores(4).ids.shape == (1, 1, 30, 3)


def test_a_chunk_of_equal_logits() -> None:
    frame = store.pack_scores(
        layer=0,
        sequence=np.zeros(2, int),
        position=np.arange(2),
        ids=np.array([[1], [2]]),
        logits=np.full((2, 1), -3.5),
        log_partition=np.zeros(2),
    )
    assert frame["low"].to_list() == frame["high"].to_list() == [-3.5]
    assert frame["scores"].to_list() == [[0, 0]]


def test_a_run_without_scores_says_how_to_get_them(tmp_path: Path) -> None:
    writer = store.RunWriter.create(tmp_path, "none", store.RunInfo(model="toy"))
    writer.write_shard({"sequence": {"sequence": [0], "domain": ["code"], "tokens": [1]}})
    with pytest.raises(StoreError, match="no router scores: collect it again with --router-scores"):
        store.open_run(writer.finish(seconds=1.0)).router_scores()
