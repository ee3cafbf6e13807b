"""Plain .npz traces: what is read, and what is refused."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.errors import ImportFileError
from profiler.importers import npy
from tests.profiler.importers.traces import arrays, bring_in, left_behind, write_npz

CONFIG = {"model_type": "toy", "num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 5}


def test_the_trace_comes_back(tmp_path: Path) -> None:
    trace = arrays()
    labels = np.array(["code", "math", "code", "math"])
    file = write_npz(tmp_path / "t.npz", trace, domain=labels, category=np.array(["a", "b", "c", "d"]))
    run = bring_in("npz", file, tmp_path / "runs")
    for layer in range(3):
        read = run.layer_selections(layer=layer, weights=True)
        np.testing.assert_array_equal(read.ids, trace.experts[:, layer])
        assert read.weights is not None
        np.testing.assert_allclose(read.weights, trace.weights[:, layer], atol=1 / 500)
    assert run.table("sequence").select("domain", "source").rows() == [
        ("code", "a"), ("math", "b"), ("code", "c"), ("math", "d")
    ]  # fmt: skip
    assert set(run.table("router_load")["phase"]) == {"decode"}


def test_prompt_and_decode_are_told_apart(tmp_path: Path) -> None:
    trace = arrays()
    run = bring_in(
        "npz", write_npz(tmp_path / "t.npz", trace, prompt_tokens=np.array([3, 100, 0, 1])), tmp_path / "runs"
    )
    load = run.table("router_load").filter(run.table("router_load")["layer"] == 0)
    assert dict(load.select("phase", "tokens").iter_rows()) == {"prompt": 104, "decode": 640}
    assert run.table("sequence")["prompt_tokens"].to_list() == [3, 100, 0, 1]


@pytest.mark.parametrize(
    ("config", "layers"),
    [({"num_hidden_layers": 3}, [0, 1, 2]), ({"first_k_dense_replace": 2}, [2, 3, 4])],
)
def test_layers_are_named_by_the_configuration(tmp_path: Path, config: dict[str, int], layers: list[int]) -> None:
    run = bring_in("npz", write_npz(tmp_path / "t.npz", arrays()), tmp_path / "runs", config=CONFIG | config)
    assert [layer.layer for layer in run.layers] == layers
    assert run.info.model_type == "toy"


def test_rows_of_dense_layers_are_left_out(tmp_path: Path) -> None:
    trace = arrays()
    experts = np.full((744, 5, 2), -1, np.int8)
    experts[:, 2:] = trace.experts
    weights = np.zeros((744, 5, 2), np.float32)
    weights[:, 2:] = trace.weights
    config = CONFIG | {"first_k_dense_replace": 2}
    file = write_npz(tmp_path / "t.npz", trace, experts=experts, weights=weights)
    run = bring_in("npz", file, tmp_path / "runs", config=config)
    assert [layer.layer for layer in run.layers] == [2, 3, 4]
    np.testing.assert_array_equal(run.layer_selections(layer=3).ids, trace.experts[:, 1])
    experts[5, 1] = [0, 1]
    with pytest.raises(ImportFileError, match="layer 1 is dense by --config, but uses expert 1"):
        bring_in("npz", write_npz(tmp_path / "u.npz", trace, experts=experts, weights=weights), tmp_path / "runs",
                 name="other", config=config)  # fmt: skip


def test_token_texts(tmp_path: Path) -> None:
    trace = arrays(lengths=(3, 2))
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([["Hello", " wörld", "!"], []]), encoding="utf-8")
    run = bring_in("npz", write_npz(tmp_path / "t.npz", trace), tmp_path / "runs", extra={"tokens": texts})
    text = run.sequence_text(0)
    assert text is not None
    assert b"".join(text.pieces).decode() == "Hello wörld!"
    assert run.info.text_kept
    texts.write_text(json.dumps([["one"], []]))
    with pytest.raises(ImportFileError, match="sequence 0 has no text for each of its 3 tokens"):
        bring_in("npz", tmp_path / "t.npz", tmp_path / "runs", name="other", extra={"tokens": texts})


def test_the_largest_unsigned_id_is_none_or_the_last_expert(tmp_path: Path) -> None:
    experts = np.array([[[3, 255]], [[255, 7]]], np.uint8)
    for num_experts, expected in ((16, [[3, -1], [7, -1]]), (256, [[3, 255], [255, 7]])):
        file = tmp_path / f"{num_experts}.npz"
        np.savez(file, experts=experts, num_experts=np.int64(num_experts))
        run = bring_in("npz", file, tmp_path / "runs", name=f"of-{num_experts}")
        assert run.layer_selections(layer=0).ids.tolist() == expected


def _changed(**changes: Any) -> dict[str, Any]:
    return changes


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (_changed(num_experts=np.int64(2)), {}, "expert [2-5] is out of range; 2 experts"),
        (_changed(num_experts=np.int64(8)), {"num_experts": 6}, "experts per layer are 6 by one source and 8"),
        (_changed(experts=np.zeros((744, 3), np.uint8)), {}, r"experts is uint8 \(744, 3\)"),
        (_changed(experts=np.zeros((744, 3, 2))), {}, "experts is float64"),
        (_changed(experts=np.zeros((0, 3, 2), np.uint8)), {}, r"experts has shape \(0, 3, 2\)"),
        (_changed(weights=np.zeros((744, 3, 1))), {}, "weights have shape"),
        (_changed(offsets=np.array([0, 5])), {}, "offsets do not rise from 0 to the 744 tokens"),
        (_changed(offsets=np.array([0, 5, 5, 744])), {}, "offsets do not rise"),
        (_changed(domain=np.array(["a"])), {}, "it has a text per sequence"),
        (_changed(layers=np.array([0, 0, 1])), {}, "do not name 3 layers"),
        (_changed(prompt_tokens=np.array([9, 9, 9, 9])), {}, "prompt_tokens do not fit"),
        (_changed(token_ids=np.full(744, -1)), {}, "token ids run from -1"),
        ({}, {"config": CONFIG}, "has 3 layers; --config has 5 MoE layers of 5 in all"),
        ({}, {"config": CONFIG | {"num_hidden_layers": 3, "num_experts_per_tok": 4}}, "2 experts per token, --config"),
        (_changed(domain=np.array([None, 1, 2, 3], object)), {}, "nothing is unpickled"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    file = write_npz(tmp_path / "t.npz", arrays(), **changes)
    with pytest.raises(ImportFileError, match=message) as caught:
        bring_in("npz", file, tmp_path / "runs", **options)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path / "runs") == []


def test_experts_are_never_guessed_from_the_largest_id(tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    np.savez(file, experts=np.zeros((2, 1, 1), np.uint8))
    with pytest.raises(ImportFileError, match="give --config MODEL, or --num-experts"):
        bring_in("npz", file, tmp_path / "runs")


def _member(header: bytes, data: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def _zip(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 48, 8)}\n", "declares uint8"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 48, 8)}\n", "declares the shape"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 1, 1)}\n", "nothing is unpickled"),
        (b"{'descr': '|u1', 'fortran_order': True, 'shape': (2, 2, 1)}\n", "Fortran order"),
        (b"__import__('os').system('false')\n", "no header of an .npy array"),
        (b"(" * 3000 + b"\n", "no header of an .npy array"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: bytes, message: str) -> None:
    file = _zip(tmp_path / "t.npz", "experts.npy", _member(header, b"\x00" * 4))
    with pytest.raises(ImportFileError, match=message):
        bring_in("npz", file, tmp_path / "runs", num_experts=4)


def test_a_bomb_is_not_inflated(tmp_path: Path) -> None:
    size = npy.MAX_SMALL + 1
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size}, 1, 1)}}\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("experts.npy", "w") as member:
        member.write(_member(header, b""))
        for _ in range(size // (1 << 24)):
            member.write(bytes(1 << 24))
        member.write(bytes(size % (1 << 24)))
    (tmp_path / "t.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ImportFileError, match="would grow from"):
        bring_in("npz", tmp_path / "t.npz", tmp_path / "runs", num_experts=4)


@pytest.mark.parametrize("keep", [0, 1, 30, 1000, -10])
def test_cut_files(tmp_path: Path, keep: int) -> None:
    whole = write_npz(tmp_path / "t.npz", arrays()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:keep])
    with pytest.raises(ImportFileError, match="is no .npz file"):
        bring_in("npz", tmp_path / "cut.npz", tmp_path / "runs")
