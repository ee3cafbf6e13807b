"""Readers of engines' files, against values counted by hand from the documented layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moescope.errors import ImportFileError
from tests.profiler.importers import fixtures
from tests.profiler.importers.fixtures import CONFIG, REPLICAS
from tests.profiler.importers.traces import bring_in, left_behind, selections_of

RUNS = "runs"


def _ids(tokens: int, *, layers: int = 3, dense: int = -1, seed: int = 0) -> np.ndarray:
    """(tokens, layers, 2) distinct ids of four experts; the first layer is dense."""
    ids = np.argsort(np.random.default_rng(seed).random((tokens, layers, 4)), axis=-1)[..., :2].astype(np.int32)
    if layers == 3:
        ids[:, 0] = dense
    return ids


# --- SGLang ---


def test_sglang_stat_counts_steps_and_leaves_out_the_empty_ring(tmp_path: Path) -> None:
    counts = np.zeros((6, 3, 4), np.int32)
    counts[0, 1], counts[0, 2] = [1, 2, 3, 0], [0, 6, 0, 0]
    counts[1, 1], counts[1, 2] = [2, 0, 0, 0], [1, 1, 0, 0]
    content = {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": 0.5}
    run = bring_in("sglang-stat", fixtures.torch_file(tmp_path / "a.pt", content), tmp_path / RUNS, config=CONFIG)
    assert selections_of(run) == {(1, 0): 3, (1, 1): 2, (1, 2): 3, (2, 0): 1, (2, 1): 7}
    assert run.table("load_span").filter(pl.col("layer") == 2)["tokens"].to_list() == [[0, 6, 0, 0], [1, 1, 0, 0]]
    assert run.info.tokens == 4
    assert {"trace", "order", "weights", "text"} <= set(run.omissions)
    assert "ring of steps" not in run.table("check")["name"].to_list()


def test_sglang_stat_warns_of_a_ring_that_may_have_gone_round(tmp_path: Path) -> None:
    content = {"logical_count": np.ones((2, 2, 4), np.int32)}
    file = fixtures.torch_file(tmp_path / "a.pt", content)
    run = bring_in("sglang-stat", file, tmp_path / RUNS, config=CONFIG)
    assert "ring of steps" in run.table("check")["name"].to_list()


def test_sglang_stat_begins_where_the_ring_was_left(tmp_path: Path) -> None:
    # the last dump emptied the ring, but left its index at 4
    counts = np.zeros((6, 2, 4), np.int32)
    for step, row in enumerate((4, 5, 0)):
        counts[row, :, 0] = step + 1
    file = fixtures.torch_file(tmp_path / "a.pt", {"logical_count": counts})
    run = bring_in("sglang-stat", file, tmp_path / RUNS, config=CONFIG)
    spans = run.table("load_span").filter(pl.col("layer") == 1).sort("span")["tokens"].to_list()
    assert [row[0] for row in spans] == [1, 2, 3]
    assert "ranks added" not in run.table("check")["name"].to_list()


def test_sglang_stat_warns_of_ranks_that_were_added(tmp_path: Path) -> None:
    counts = np.array([[[4, 8, 12, 0], [8, 0, 8, 8]], [[0] * 4] * 2], np.int32)
    file = fixtures.torch_file(tmp_path / "a.pt", {"logical_count": counts})
    run = bring_in("sglang-stat", file, tmp_path / RUNS, config=CONFIG)
    details = dict(run.table("check").select("name", "detail").iter_rows())
    assert details["ranks added"].startswith("every count is a multiple of 4")
    assert selections_of(run)[1, 0] == 4


def _rank_files(folder: Path, *ranks: np.ndarray) -> Path:
    """A folder with the file of each rank: its counts (layers, replicas) of forward pass 9."""
    folder.mkdir()
    for rank, counts in enumerate(ranks):
        record = {"forward_pass_id": 9, "rank": rank, "gatherer_key": "primary", "global_physical_count": counts}
        content = {"records": [record], "last_physical_to_logical_map": REPLICAS}
        fixtures.torch_file(folder / f"expert_distribution_recorder_1.0_{rank}.pt", content)
    return folder


def test_sglang_per_pass_adds_ranks_and_maps_replicas(tmp_path: Path) -> None:
    one, two = np.zeros((3, 6), np.int32), np.zeros((3, 6), np.int32)
    one[1], one[2] = [1, 2, 3, 4, 5, 6], [1, 0, 0, 0, 0, 7]
    two[1], two[2] = [0, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 0]
    run = bring_in("sglang-per-pass", _rank_files(tmp_path / "dump", one, two), tmp_path / RUNS, config=CONFIG)
    # layer 1: replicas are experts 3 2 1 0 3 2; layer 2: 1 0 2 3 2 1
    assert selections_of(run) == {(1, 0): 4, (1, 1): 3, (1, 2): 10, (1, 3): 6, (2, 1): 10}
    assert "ranks that agree" not in run.table("check")["name"].to_list()


def test_sglang_per_pass_takes_ranks_that_share_their_tokens_once(tmp_path: Path) -> None:
    counts = np.zeros((3, 6), np.int32)
    counts[1] = [1, 2, 3, 4, 5, 6]
    run = bring_in("sglang-per-pass", _rank_files(tmp_path / "dump", *[counts] * 4), tmp_path / RUNS, config=CONFIG)
    assert selections_of(run) == {(1, 0): 4, (1, 1): 3, (1, 2): 8, (1, 3): 6}
    assert "ranks that agree" in run.table("check")["name"].to_list()


def test_sglang_per_token_builds_sequences_from_positions(tmp_path: Path) -> None:
    physical = np.argsort(np.random.default_rng(1).random((3, 9, 6)), axis=-1).astype(np.int32)
    physical = np.where(np.arange(3)[:, None, None] == 0, -1, physical)

    def two(tokens: slice) -> np.ndarray:
        """Two replicas of different experts per token."""
        chosen = np.full((3, tokens.stop - tokens.start, 2), -1, np.int32)
        for layer in (1, 2):
            for row, order in enumerate(physical[layer, tokens]):
                second = next(other for other in order[1:] if REPLICAS[layer, other] != REPLICAS[layer, order[0]])
                chosen[layer, row] = [order[0], second]
        return chosen

    passes = [two(slice(0, 5)), two(slice(5, 7)), two(slice(7, 9))]
    records = [
        fixtures.record(ids=passes[0], input_ids=[5, 6, 7, 8, 9], positions=[0, 1, 2, 0, 1], lengths=[3, 2]),
        fixtures.record(ids=passes[1], input_ids=[10, 11], positions=[3, 2], lengths=None),
        fixtures.record(ids=passes[2], input_ids=[12, 13], positions=[4, 4], lengths=None),
    ]
    content = {"records": records, "last_physical_to_logical_map": REPLICAS}
    file = fixtures.torch_file(tmp_path / "a.pt", content)
    run = bring_in("sglang-per-token", file, tmp_path / RUNS, config=CONFIG)
    # prompts of 3 and 2 tokens; 10 goes on the first, 11 on the second; of two tokens at position 4, nobody knows
    assert run.table("sequence").select("tokens", "prompt_tokens").rows() == [(4, 3), (3, 2), (1, 0), (1, 0)]
    text = pl.concat([run.table("sequence_token").filter(pl.col("sequence") == number) for number in range(4)])
    assert text.group_by("sequence", maintain_order=True).agg(pl.col("token_ids").explode())["token_ids"].to_list() == [
        [5, 6, 7, 10], [8, 9, 11], [12], [13]
    ]  # fmt: skip
    flat = np.concatenate(passes, axis=1)
    logical = np.take_along_axis(REPLICAS[1], flat[1].reshape(-1), 0).reshape(9, 2)
    order = [0, 1, 2, 5, 3, 4, 6, 7, 8]
    np.testing.assert_array_equal(run.layer_selections(layer=1).ids, logical[order])
    assert [layer.layer for layer in run.layers] == [1, 2]


def test_sglang_responses(tmp_path: Path) -> None:
    first, second = _ids(5, dense=0), _ids(3, dense=0, seed=1)
    objects = [fixtures.sglang_response(first, prompt_tokens=2), fixtures.sglang_response(second, prompt_tokens=9)]
    run = bring_in("sglang-responses", fixtures.jsonl(tmp_path / "a.jsonl", objects), tmp_path / RUNS, config=CONFIG)
    assert run.table("sequence").select("tokens", "prompt_tokens").rows() == [(5, 2), (3, 3)]
    np.testing.assert_array_equal(run.layer_selections(layer=2).ids, np.concatenate([first, second])[:, 2])
    with pytest.raises(ImportFileError, match="give --config"):
        bring_in("sglang-responses", tmp_path / "a.jsonl", tmp_path / RUNS, name="other")
    with pytest.raises(ImportFileError, match="do not fill whole tokens of 4 layers"):
        bring_in("sglang-responses", tmp_path / "a.jsonl", tmp_path / RUNS, name="other",
                 config=CONFIG | {"num_hidden_layers": 4, "num_experts_per_tok": 4})  # fmt: skip


def test_sglang_responses_of_the_openai_endpoints(tmp_path: Path) -> None:
    ids, usage = _ids(5, dense=0), {"prompt_tokens": 4, "completion_tokens": 2}
    objects = [
        {"id": "cmpl-1", "choices": [{"token_ids": [5, 6], "prompt_token_ids": [1, 2, 3, 4]}], "usage": usage,
         "sglext": {"routed_experts": fixtures.flat(ids)}},
        # older: in the choice
        {"id": "cmpl-2", "usage": usage, "choices": [
            {"token_ids": [5, 6], "prompt_token_ids": [1, 2, 3, 4], "sglext": {"routed_experts": fixtures.flat(ids)}}]},
    ]  # fmt: skip
    run = bring_in("sglang-responses", fixtures.jsonl(tmp_path / "a.jsonl", objects), tmp_path / RUNS, config=CONFIG)
    assert run.table("sequence").select("tokens", "prompt_tokens", "source").rows() == [
        (5, 4, "cmpl-1"),
        (5, 4, "cmpl-2"),
    ]
    np.testing.assert_array_equal(run.layer_selections(layer=1).ids, np.concatenate([ids, ids])[:, 1])
    assert run.table("sequence_token")["token_ids"].to_list() == [[1, 2, 3, 4, 5]] * 2


def test_sglang_responses_in_small_types_without_their_beginning(tmp_path: Path) -> None:
    ids, counts = _ids(6, dense=0), {"prompt_tokens": 4, "completion_tokens": 3}
    objects = [
        fixtures.sglang_response(
            ids, **counts, routed_experts=fixtures.flat(ids, "<u2"), routed_experts_dtype="uint16"
        ),
        fixtures.sglang_response(ids, **counts, routed_experts=fixtures.flat(ids, "u1"), routed_experts_dtype="uint8"),
        fixtures.sglang_response(ids[3:], **counts),  # routed_experts_start_len of 3
    ]
    run = bring_in("sglang-responses", fixtures.jsonl(tmp_path / "a.jsonl", objects), tmp_path / RUNS, config=CONFIG)
    assert run.table("sequence").select("tokens", "prompt_tokens").rows() == [(6, 4), (6, 4), (3, 1)]
    np.testing.assert_array_equal(run.layer_selections(layer=2).ids, np.concatenate([ids, ids, ids[3:]])[:, 2])
    notes = dict(run.table("check").select("name", "detail").iter_rows())
    assert notes["requests without beginning"].startswith("1 requests asked")


# --- vLLM ---


@pytest.mark.parametrize("form", ["lists", "base64", "whole", "outputs"])
def test_vllm_responses_in_their_shapes(tmp_path: Path, form: str) -> None:
    ids = _ids(6, layers=2)
    pack: Any = fixtures.encoded if form == "base64" else (lambda part: part.tolist())
    response: dict[str, Any] = {"id": "cmpl-1", "prompt_token_ids": [1, 2, 3, 4]}
    if form in ("whole", "outputs"):
        choices = [{"token_ids": [5, 6, 7], "routed_experts": pack(ids)}]
        response["outputs" if form == "outputs" else "choices"] = choices
    else:
        response["prompt_routed_experts"] = pack(ids[:4])
        response["choices"] = [{"token_ids": [5, 6, 7], "routed_experts": pack(ids[4:])}]
    run = bring_in("vllm", fixtures.jsonl(tmp_path / "a.jsonl", [response]), tmp_path / RUNS, config=CONFIG)
    np.testing.assert_array_equal(run.layer_selections(layer=1).ids, ids[:, 0])
    assert run.table("sequence").select("tokens", "prompt_tokens").rows() == [(6, 4)]
    assert run.table("sequence_token")["token_ids"].explode().to_list() == [1, 2, 3, 4, 5, 6]


def test_vllm_cached_prompts_preempted_requests_and_several_choices(tmp_path: Path) -> None:
    ids = _ids(5)
    ids[:2] = -1  # taken from the prefix cache
    other = _ids(2, seed=3)
    objects = [
        {"prompt_routed_experts": ids[:3].tolist(),
         "choices": [{"routed_experts": ids[3:].tolist()}, {"routed_experts": other.tolist()}]},
        {"choices": [{"routed_experts": None}]},
    ]  # fmt: skip
    run = bring_in("vllm", fixtures.jsonl(tmp_path / "a.jsonl", objects), tmp_path / RUNS, config=CONFIG)
    assert run.table("sequence").select("tokens", "prompt_tokens").rows() == [(5, 3), (2, 0)]
    assert run.layer_selections(layer=1).ids[:2].tolist() == [[-1, -1], [-1, -1]]
    assert sum(selections_of(run).values()) == 2 * 2 * 5
    notes = dict(run.table("check").select("name", "detail").iter_rows())
    assert notes["requests without routing"].startswith("1 requests came without")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_vllm_sends_the_whole_sequence_as_npy_with_zeros_in_dense_layers(tmp_path: Path, dtype: str) -> None:
    first, second = _ids(6, dense=0), _ids(5, dense=0, seed=1)
    response = {
        "id": "cmpl-1", "usage": {"prompt_tokens": 4, "completion_tokens": 5},
        "choices": [
            {"prompt_token_ids": [1, 2, 3, 4], "token_ids": [5, 6, 7], "routed_experts": fixtures.npy(first, dtype)},
            {"prompt_token_ids": [1, 2, 3, 4], "token_ids": [8, 9], "routed_experts": fixtures.npy(second, dtype)},
        ],
    }  # fmt: skip
    run = bring_in("vllm", fixtures.jsonl(tmp_path / "a.jsonl", [response]), tmp_path / RUNS, config=CONFIG)
    assert run.table("sequence").select("tokens", "prompt_tokens").rows() == [(6, 4), (5, 4)]
    np.testing.assert_array_equal(run.layer_selections(layer=1).ids, np.concatenate([first, second])[:, 1])
    assert run.table("sequence_token")["token_ids"].to_list() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 8]]


def test_vllm_chat_without_token_ids_and_without_the_beginning(tmp_path: Path) -> None:
    ids = _ids(6, dense=0)
    objects = [
        {"choices": [{"routed_experts": fixtures.npy(part)}], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}
        for part in (ids, ids[2:])  # routed_experts_prompt_start of 2
    ]
    run = bring_in("vllm", fixtures.jsonl(tmp_path / "a.jsonl", objects), tmp_path / RUNS, config=CONFIG)
    assert run.table("sequence").select("tokens", "prompt_tokens").rows() == [(6, 4), (4, 2)]
    assert "requests without beginning" in run.table("check")["name"].to_list()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_vllm_arrays(tmp_path: Path, suffix: str) -> None:
    ids = _ids(6).astype(np.int16)
    file = tmp_path / f"a{suffix}"
    np.save(file, ids) if suffix == ".npy" else np.savez(file, one=ids, two=ids[:2])
    run = bring_in("vllm", file, tmp_path / RUNS, config=CONFIG)
    assert run.table("sequence")["tokens"].to_list() == ([6] if suffix == ".npy" else [6, 2])
    np.testing.assert_array_equal(run.layer_selections(layer=2).ids[:6], ids[:, 2])


# --- TensorRT-LLM ---


def test_tensorrt_llm_adds_ranks(tmp_path: Path) -> None:
    one = {"100_1": np.array([1, 2, 3, 4], np.int32), "101_1": np.array([1, 0, 0, 0], np.int32),
           "100_2": np.array([5, 5, 0, 0], np.int32)}  # fmt: skip
    two = {"100_1": np.array([1, 1, 1, 1], np.int32)}
    run = bring_in("tensorrt-llm", fixtures.tensorrt_llm(tmp_path / "a", [one, two]), tmp_path / RUNS)
    assert selections_of(run) == {(1, 0): 3, (1, 1): 3, (1, 2): 4, (1, 3): 5, (2, 0): 5, (2, 1): 5}
    spans = run.table("load_span").filter(pl.col("layer") == 1)["tokens"].to_list()
    assert spans == [[2, 3, 4, 5], [1, 0, 0, 0]]
    assert [layer.top_k for layer in run.layers] == [2, 2]


def test_tensorrt_llm_takes_ranks_that_share_their_tokens_once(tmp_path: Path) -> None:
    one = {"100_1": np.array([1, 2, 3, 4], np.int64), "100_2": np.array([5, 5, 0, 0], np.int64)}
    run = bring_in("tensorrt-llm", fixtures.tensorrt_llm(tmp_path / "a", [one] * 4), tmp_path / RUNS)
    assert selections_of(run) == {(1, 0): 1, (1, 1): 2, (1, 2): 3, (1, 3): 4, (2, 0): 5, (2, 1): 5}
    assert "ranks that agree" in run.table("check")["name"].to_list()


def test_tensorrt_llm_slots_of_a_load_balancer(tmp_path: Path) -> None:
    slots = {"7_1": np.array([1, 2, 3, 4, 5, 6], np.int32), "7_2": np.array([1, 0, 0, 0, 0, 7], np.int32)}
    folder = fixtures.tensorrt_llm(tmp_path / "a", [slots], num_experts=6)
    (tmp_path / "map.json").write_text(json.dumps(REPLICAS[1:].tolist()))
    with pytest.raises(ImportFileError, match="experts per layer are 4 by one source and 6 by another"):
        bring_in("tensorrt-llm", folder, tmp_path / RUNS, config=CONFIG)
    run = bring_in("tensorrt-llm", folder, tmp_path / RUNS, config=CONFIG,
                   extra={"physical_to_logical": tmp_path / "map.json"})  # fmt: skip
    assert selections_of(run) == {(1, 0): 4, (1, 1): 3, (1, 2): 8, (1, 3): 6, (2, 1): 8}
    (tmp_path / "map.json").write_text(json.dumps(REPLICAS.tolist()))
    with pytest.raises(ImportFileError, match=r"counts 6 slots in 2 layers; --physical-to-logical maps \(3, 6\)"):
        bring_in("tensorrt-llm", folder, tmp_path / RUNS, name="other", config=CONFIG,
                 extra={"physical_to_logical": tmp_path / "map.json"})  # fmt: skip


def test_tensorrt_llm_raw_ids_are_counted(tmp_path: Path) -> None:
    raw = {"3_0": np.array([[0, 1], [1, 2], [3, 1]], np.int32)}
    run = bring_in("tensorrt-llm", fixtures.tensorrt_llm(tmp_path / "a", [raw], raw=True), tmp_path / RUNS)
    assert selections_of(run) == {(0, 0): 1, (0, 1): 3, (0, 2): 1, (0, 3): 1}


# --- llama.cpp ---


def test_imatrix_reads_one_projection_per_layer(tmp_path: Path) -> None:
    file = fixtures.imatrix(tmp_path / "a.gguf", {1: [5, 0, 2, 9], 2: [1, 1, 1, 1]})
    run = bring_in("imatrix", file, tmp_path / RUNS, config=CONFIG)
    assert selections_of(run) == {(1, 0): 5, (1, 2): 2, (1, 3): 9, (2, 0): 1, (2, 1): 1, (2, 2): 1, (2, 3): 1}
    assert run.info.settings["imatrix.chunk_count"] == 7
    assert run.table("check").filter(pl.col("name") == "projections agree")["status"].to_list() == ["pass"]
    assert not run.has_trace and "order" in run.omissions


def test_imatrix_says_where_projections_differ(tmp_path: Path) -> None:
    tensors = {
        "blk.0.ffn_up_exps.weight.counts": np.array([[1], [2]], np.float32),
        "blk.0.ffn_down_exps.weight.counts": np.array([[1], [3]], np.float32),
    }
    file = fixtures.gguf(tmp_path / "a.gguf", {"general.type": "imatrix"}, tensors)
    run = bring_in("imatrix", file, tmp_path / RUNS)
    assert selections_of(run) == {(0, 0): 1, (0, 1): 2}
    assert run.table("check").filter(pl.col("name") == "projections agree")["status"].to_list() == ["warning"]


# --- what does not fit ---


def _torch(content: Any) -> Any:
    return lambda folder: fixtures.torch_file(folder / "a.pt", content)


def _lines(*objects: Any) -> Any:
    return lambda folder: fixtures.jsonl(folder / "a.jsonl", objects)


def _vllm(ids: Any) -> Any:
    return _lines({"routed_experts": ids})


def _ranks(*ranks: dict[str, Any]) -> Any:
    return lambda folder: fixtures.tensorrt_llm(folder / "a", ranks)


def _gguf(values: dict[str, Any], **more: Any) -> Any:
    return lambda folder: fixtures.gguf(folder / "a.gguf", values, {}, **more)


def _imatrix(counts: dict[int, list[float]]) -> Any:
    return lambda folder: fixtures.imatrix(folder / "a.gguf", counts)


def _passes(mode: int = 1, **one: Any) -> Any:
    record = fixtures.record(**one) | {"forward_mode": mode}
    return _torch({"records": [record], "last_physical_to_logical_map": REPLICAS})


def _twice() -> Any:
    record = {"forward_pass_id": 9, "rank": 1, "global_physical_count": np.ones((3, 6), int)}
    return _torch({"records": [record, record], "last_physical_to_logical_map": REPLICAS})


def _sglang(ids: np.ndarray, **meta: Any) -> Any:
    return _lines(fixtures.sglang_response(ids, **meta))


@pytest.mark.parametrize(
    ("format_name", "write", "message"),
    [
        ("sglang-stat", _torch({"records": []}), "has no 'logical_count'"),
        ("sglang-stat", _torch({"logical_count": np.zeros((2, 3))}), "3 axes"),
        ("sglang-stat", _torch({"logical_count": np.zeros((1, 3, 4), int)}), "counts nothing"),
        ("sglang-stat", _torch({"logical_count": np.ones((1, 3, 4), int)}), "layer 0 is dense by --config, but counts"),
        ("sglang-stat", _torch({"logical_count": np.ones((1, 2, 5), int)}), "experts per layer are 4 by one .* and 5"),
        ("sglang-stat", _torch({"logical_count": -np.ones((1, 2, 4), int)}), "a count of selections is -1"),
        ("sglang-per-pass", _torch({"records": []}), "last_physical_to_logical_map"),
        ("sglang-per-token", _passes(ids=np.full((3, 1, 2), 6), input_ids=[1], positions=[0], lengths=[1]),
         "do not fit the map"),
        ("sglang-per-token", _passes(ids=np.zeros((3, 2, 2)), input_ids=[1], positions=[0, 1], lengths=[2]),
         "other numbers of positions"),
        ("sglang-per-token", _passes(ids=np.zeros((3, 1, 2)), input_ids=[1.5], positions=[0], lengths=[1]),
         "input_ids is no list of whole numbers"),
        ("sglang-per-token", _passes(5, ids=np.zeros((3, 2, 2)), input_ids=[1, 2], positions=[4, 5], lengths=None),
         "holds speculative decoding"),
        ("sglang-per-pass", _twice(), "forward pass 9 of rank 1 stands there twice"),
        ("sglang-responses", _lines({"choices": [{}]}), "no routed_experts in meta_info or sglext"),
        ("sglang-responses", _sglang(_ids(3, dense=0), prompt_tokens=1, routed_experts_dtype="int8"), "are of int8"),
        ("sglang-responses", _sglang(_ids(9, dense=0), prompt_tokens=3, completion_tokens=4), "9 rows for 3 tokens"),
        ("sglang-responses", _sglang(_ids(2, dense=1), prompt_tokens=1), "layer 0 is dense by --config, but uses"),
        ("vllm", _vllm("AAAA"), "no header of an .npy array"),
        ("vllm", _vllm(fixtures.npy(_ids(4))[:-8]), "declares uint8"),
        ("vllm", _vllm(fixtures.npy(_ids(4, dense=1))), "layer 0 is dense by --config, but uses"),
        ("vllm", _lines({"choices": []}), "neither prompt_routed_experts nor"),
        ("vllm", _vllm([[[0, 1]], [[1]]]), "not of equal length"),
        ("vllm", _vllm([[[0, 9]] * 2]), "expert 9 is out of range"),
        ("vllm", _vllm([[[0, 1]] * 4]), "has 4 layers; --config"),
        ("vllm", _lines("x"), "holds str, not a response"),
        ("tensorrt-llm", _ranks({"x": np.zeros(4, np.int32)}), "not named ITERATION"),
        ("tensorrt-llm", _ranks({"0_1": np.zeros(5, np.int32)}), "5 counts; the model"),
        ("tensorrt-llm", _ranks(), "holds no rank"),
        ("imatrix", _gguf({"general.type": "model"}), "not 'imatrix'"),
        ("imatrix", _gguf({"general.type": "imatrix"}), "has no counts of experts"),
        ("imatrix", _imatrix({1: [0.5, 1, 1, 1]}), "holds no counts"),
        ("imatrix", _imatrix({1: [float("nan"), 1, 1, 1]}), "holds no counts"),
        ("imatrix", _imatrix({0: [1, 1, 1, 1]}), "layer 0, which is dense or missing"),
        ("imatrix", _imatrix({1: [512]}), "one count for all experts"),
        ("imatrix", _gguf({}, version=1), "GGUF version 1"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, format_name: str, write: Any, message: str) -> None:
    with pytest.raises(ImportFileError, match=message) as caught:
        bring_in(format_name, write(tmp_path), tmp_path / RUNS, config=CONFIG)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path / RUNS) == []


def test_a_map_of_replicas_given_by_the_user(tmp_path: Path) -> None:
    counts = np.zeros((3, 6), np.int64)
    counts[2, 5] = 7
    record = {"forward_pass_id": 0, "global_physical_count": counts}
    file = fixtures.torch_file(tmp_path / "a.pt", {"records": [record]})
    (tmp_path / "map.json").write_text(json.dumps(REPLICAS.tolist()))
    np.save(tmp_path / "map.npy", REPLICAS)
    for number, name in enumerate(("map.json", "map.npy")):
        run = bring_in("sglang-per-pass", file, tmp_path / RUNS, name=f"n{number}", config=CONFIG,
                       extra={"physical_to_logical": tmp_path / name})  # fmt: skip
        assert selections_of(run) == {(2, 1): 7}
    (tmp_path / "map.json").write_text(json.dumps([[0, 0, 2, 2, 2, 2]] * 3))
    with pytest.raises(ImportFileError, match="places expert 1 nowhere in layer 0"):
        bring_in("sglang-per-pass", file, tmp_path / RUNS, name="other", config=CONFIG,
                 extra={"physical_to_logical": tmp_path / "map.json"})  # fmt: skip
