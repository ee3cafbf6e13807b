"""Packing and unpacking the trace, against the arrays that went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import store
from moescope.errors import StoreError
from store import LayerInfo, RunInfo, RunWriter


def _write(
    directory: Path, lengths: list[int], ids: NDArray[np.int64], weights: NDArray[np.float64], num_experts: int
) -> store.Run:
    """A run whose sequences have these lengths; ids and weights are (layers, all tokens, k)."""
    writer = RunWriter.create(directory, "packed", RunInfo(model="toy"))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    for layer in range(len(ids)):
        shuffled = np.random.default_rng(layer).permutation(len(sequence))
        frame = store.pack_trace(
            layer=layer,
            sequence=sequence[shuffled],
            position=position[shuffled],
            ids=ids[layer][shuffled],
            weights=weights[layer][shuffled],
            num_experts=num_experts,
        )
        info = {"layer": [layer], "step": [0], "num_experts": [num_experts], "top_k": [ids.shape[-1]]}
        writer.write_shard({"route_chunk": frame, "layer": info})
    writer.write_shard(
        {
            "sequence": {
                "sequence": range(len(lengths)),
                "domain": ["even" if number % 2 == 0 else "odd" for number in range(len(lengths))],
                "tokens": lengths,
            }
        }
    )
    return store.open_run(writer.finish())


@pytest.mark.parametrize("num_experts", [16, 255, 256, 384])
def test_trace_comes_back(tmp_path: Path, num_experts: int) -> None:
    generator = np.random.default_rng(num_experts)
    lengths = [3, 700, 512, 1, 513]
    ids = generator.integers(0, num_experts, (2, sum(lengths), 4))
    ids[:, ::7, 3] = -1
    weights = np.sort(generator.random((2, sum(lengths), 4)), axis=-1)[..., ::-1] * 3
    weights[ids < 0] = 0
    run = _write(tmp_path, lengths, ids, weights, num_experts)
    trace = run.selections()
    assert trace.ids.shape == (2, 5, 700, 4)
    assert trace.lengths.tolist() == lengths
    start = 0
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(trace.ids[:, row, :length], ids[:, start : start + length])
        assert (trace.ids[:, row, length:] == -1).all()
        # 8 bits: half a step of the chunk's largest weight, which is at most 3.
        np.testing.assert_allclose(trace.weights[:, row, :length], weights[:, start : start + length], atol=3 / 509)
        start += length


def test_parts_of_a_trace(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lengths = [5, 6, 7]
    ids = generator.integers(0, 8, (3, sum(lengths), 2))
    run = _write(tmp_path, lengths, ids, np.ones_like(ids, float), 8)
    odd = run.selections(domain="odd", layers=[2])
    assert odd.layers == [(2, 0)]
    assert odd.sequences.tolist() == [1]
    np.testing.assert_array_equal(odd.ids[0, 0], ids[2, 5:11])
    assert run.selections(max_sequences=2).ids.shape == (3, 2, 6, 2)
    assert run.selections(sequences=[]).ids.shape[1] == 0
    with pytest.raises(StoreError, match=r"no MoE layer 9; it has 0, 1, 2"):
        run.selections(layers=[9])
    with pytest.raises(StoreError, match="no domain 'prose'; it has even, odd"):
        run.selections(domain="prose")


@pytest.mark.parametrize("num_experts", [16, 384])
def test_a_layer_without_padding_is_the_layer_of_the_trace(tmp_path: Path, num_experts: int) -> None:
    generator = np.random.default_rng(2)
    lengths = [3, 700, 512, 1, 513]
    ids = generator.integers(0, num_experts, (2, sum(lengths), 4))
    ids[:, ::5, 2:] = -1
    weights = np.sort(generator.random((2, sum(lengths), 4)), axis=-1)[..., ::-1] * 3
    weights[ids < 0] = 0
    run = _write(tmp_path, lengths, ids, weights, num_experts)
    for layer in range(2):
        read = run.layer_selections(layer=layer, weights=True)
        assert read.offsets.tolist() == np.cumsum([0, *lengths]).tolist()
        np.testing.assert_array_equal(read.ids, ids[layer])
        assert read.weights is not None
        np.testing.assert_allclose(read.weights, weights[layer], atol=3 / 510 + 1e-6)
        middle = run.layer_selections(layer=layer, first=1, last=2)
        assert middle.weights is None
        assert middle.sequences.tolist() == [1, 2]
        np.testing.assert_array_equal(middle.ids, ids[layer][3:1215])
    with pytest.raises(StoreError, match="no MoE layer 2"):
        run.layer_selections(layer=2)
    assert run.has_trace


def test_route_view_lists_every_selection(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    lengths = [600, 9]
    ids = generator.integers(0, 8, (2, sum(lengths), 3))
    ids[:, 1::5, 2] = -1
    run = _write(tmp_path, lengths, ids, np.ones_like(ids, float), 8)
    rows = run.query("select * from route order by layer, sequence, position, rank")
    assert len(rows) == (ids >= 0).sum()
    np.testing.assert_array_equal(rows["expert"].to_numpy(), ids[ids >= 0])
    last = run.query("select expert from route where layer = 1 and sequence = 1 and position = 8 and rank = 0")
    assert last["expert"].item() == ids[1, -1, 0]


def test_weights_that_are_no_weights_are_stored_as_zero() -> None:
    frame = store.pack_trace(
        layer=0,
        sequence=np.zeros(3, int),
        position=np.arange(3),
        ids=np.zeros((3, 1), int),
        weights=np.array([[np.nan], [-1.0], [0.5]]),
        num_experts=4,
    )
    assert frame["weights"].to_list() == [[0, 0, 255]]


def test_a_real_position_gap_starts_a_chunk() -> None:
    frame = store.pack_trace(
        layer=0,
        sequence=np.zeros(4, int),
        position=np.array([0, 1, 5, 6]),
        ids=np.arange(4)[:, None],
        weights=np.ones((4, 1)),
        num_experts=4,
    )
    assert frame["start"].to_list() == [0, 5]
    assert frame["experts"].to_list() == [[0, 1], [2, 3]]


def test_layer_info_follows_the_schema() -> None:
    columns = [column.name for column in store.tables()["layer"].columns]
    assert columns == list(LayerInfo.__dataclass_fields__)
    columns = [column.name for column in store.tables()["run"].columns]
    assert sorted(columns) == sorted(RunInfo.__dataclass_fields__)
