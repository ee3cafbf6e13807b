"""Files made to harm: a clear line instead, no code run, no memory taken, nothing left behind."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.errors import ImportFileError
from profiler.importers.registry import FORMATS
from tests.profiler.importers import fixtures
from tests.profiler.importers.fixtures import CONFIG
from tests.profiler.importers.mutate import run_mutations
from tests.profiler.importers.traces import bring_in, left_behind

NAMES = [one.name for one in FORMATS]


class _Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def _refused(format_name: str, path: Path, tmp_path: Path, message: str, **options: Any) -> None:
    options = {"config": CONFIG} | options
    with pytest.raises(ImportFileError, match=message) as caught:
        bring_in(format_name, path, tmp_path / "runs", **options)
    assert "\n" not in str(caught.value)
    assert left_behind(tmp_path / "runs") == []


@pytest.mark.parametrize("format_name", ["sglang-stat", "sglang-per-pass", "sglang-per-token"])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, format_name: str) -> None:
    import torch

    torch.save({"logical_count": _Harm(tmp_path / "harm")}, tmp_path / "new.pt")
    torch.save({"logical_count": _Harm(tmp_path / "harm")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(_Harm(tmp_path / "harm")))
    for name in ("new.pt", "old.pt", "bare.pt"):
        _refused(format_name, tmp_path / name, tmp_path, "weights only|no .pt file")
    assert not (tmp_path / "harm").exists()


def test_an_object_array_is_not_unpickled(tmp_path: Path) -> None:
    values = np.array([_Harm(tmp_path / "harm")], dtype=object)
    np.savez(tmp_path / "a.npz", experts=values)
    np.save(tmp_path / "a.npy", values)
    _refused("npz", tmp_path / "a.npz", tmp_path, "object", config={}, num_experts=4)
    _refused("vllm", tmp_path / "a.npy", tmp_path, "object")
    _refused("vllm", tmp_path / "a.npz", tmp_path, "object")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(("format_name", "name"), [("npz", "a.npz"), ("vllm", "a.npz"), ("sglang-stat", "a.pt")])
def test_a_zip_bomb_is_not_inflated(tmp_path: Path, format_name: str, name: str) -> None:
    header = np.lib.format.magic(1, 0)
    text = repr({"descr": "<i4", "fortran_order": False, "shape": (1 << 24, 3, 2)}).encode()
    text += b" " * (-(len(header) + 2 + len(text) + 1) % 64) + b"\n"
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        member = "experts.npy" if name.endswith("npz") else "a/data.pkl"
        with archive.open(member, "w", force_zip64=True) as stream:
            stream.write(header + struct.pack("<H", len(text)) + text)
            block = bytes(1 << 22)
            for _ in range((1 << 24) * 24 >> 22 if name.endswith("npz") else 64):
                stream.write(block)
    _refused(format_name, tmp_path / name, tmp_path, "times is not read|is compressed")


def test_gzip_that_grows_without_end(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.csv.gz", "wb", compresslevel=9) as stream:
        for _ in range(64):
            stream.write(b"0" * (1 << 22))
    _refused("csv", tmp_path / "a.csv.gz", tmp_path, r"a\.csv\.gz")


@pytest.mark.parametrize("format_name", NAMES)
def test_no_file_an_empty_one_a_folder_and_a_pipe(tmp_path: Path, format_name: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "empty", "folder", "pipe"):
        _refused(format_name, tmp_path / name, tmp_path, name)


@pytest.mark.parametrize("format_name", NAMES)
def test_noise_of_the_right_name(tmp_path: Path, format_name: str) -> None:
    noise = np.random.default_rng(0).bytes(4096)
    for suffix in (".npz", ".csv", ".pt", ".jsonl", ".json", ".npy", ".gguf"):
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(noise)
        _refused(format_name, path, tmp_path, "noise")


@pytest.mark.parametrize("format_name", ["vllm", "sglang-responses", "megatron"])
def test_json_as_deep_as_a_stack(tmp_path: Path, format_name: str) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "]" * 200_000 + "\n")
    _refused(format_name, tmp_path / "deep.jsonl", tmp_path, "deep.jsonl")


@pytest.mark.parametrize(
    ("shape", "message"), [([1 << 39, 1 << 39, 1 << 39], "fill"), ([-1, 3, 2], "shape"), (["6", 3, 2], "shape")]
)
def test_base64_with_a_shape_that_is_none(tmp_path: Path, shape: list[Any], message: str) -> None:
    one = {"encoding": "base64", "dtype": "int32", "shape": shape, "data": "AAAA"}
    fixtures.jsonl(tmp_path / "a.jsonl", [{"routed_experts": one}])
    _refused("vllm", tmp_path / "a.jsonl", tmp_path, message)


@pytest.mark.parametrize("value", [1 << 62, (1 << 64) - 1])
def test_gguf_lengths_that_no_file_has(tmp_path: Path, value: int) -> None:
    whole = fixtures.imatrix(tmp_path / "whole.gguf", {1: [1, 1, 1, 1]}).read_bytes()
    head = b"GGUF" + struct.pack("<I", 3)
    text = struct.pack("<Q", 4) + b"name"
    bad = {
        "tensors": head + struct.pack("<QQ", value, 0),
        "keys": head + struct.pack("<QQ", 0, value),
        "name": head + struct.pack("<QQQ", 0, 1, value),
        "array": head + struct.pack("<QQ", 0, 1) + text + struct.pack("<IIQ", 9, 8, value),
        "axis": head + struct.pack("<QQ", 1, 0) + text + struct.pack("<IQQIQ", 2, value, value, 0, 0),
        "offset": head + struct.pack("<QQ", 1, 0) + text + struct.pack("<IQIQ", 1, 1, 0, value),
    }
    for name, start in bad.items():
        (tmp_path / f"{name}.gguf").write_bytes(start + whole[24:])
        _refused("imatrix", tmp_path / f"{name}.gguf", tmp_path, "declare")


def test_a_safetensors_header_longer_than_its_file(tmp_path: Path) -> None:
    folder = fixtures.tensorrt_llm(tmp_path / "a", [{"0_1": np.ones(4, np.int32)}])
    data = (folder / "rank0.safetensors").read_bytes()
    (folder / "rank0.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    _refused("tensorrt-llm", folder, tmp_path, "no .safetensors file")


def test_names_and_labels_stay_text(tmp_path: Path) -> None:
    label = "<script>alert(1)</script>'; drop table run; --"
    np.savez(tmp_path / "a.npz", experts=np.zeros((2, 1, 1), np.uint8), domain=np.array([label]), num_experts=4)
    run = bring_in("npz", tmp_path / "a.npz", tmp_path / "runs")
    assert run.table("sequence")["domain"].to_list() == [label]


def test_the_command_ends_in_one_line_and_code_two(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps(_Harm(tmp_path / "harm")))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "app.cli", "import", "sglang-stat", str(tmp_path / "a.pt"),
         "--config", str(tmp_path / "config.json"), "--store", str(tmp_path / "runs")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "Traceback" not in done.stderr and not (tmp_path / "harm").exists()


def test_mutants_are_read_or_refused() -> None:
    outcomes, wrong = run_mutations(150, seed=1)
    assert wrong == []
    assert sum(number for outcome, number in outcomes.items() if outcome.endswith("read")) > 10
