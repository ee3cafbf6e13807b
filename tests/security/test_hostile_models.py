"""Model folders made to harm: code that comes along is never run, and sizes that cannot be are refused first."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from compressor.families.plausible import require_plausible
from moescope.errors import ModelError
from tests.compressor.planned import plan
from tests.compressor.test_plan_rules import GOOD

CONFIG = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 32, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 64,
}  # fmt: skip
CODE = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}


def safetensors(header: Any, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def tensor(shape: list[int], offsets: list[int]) -> bytes:
    stated = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return safetensors({"model.embed_tokens.weight": stated}, b"\0" * 8)


FILES = {
    "pickle": ("pytorch_model.bin", b"cposix\nsystem\n(S'touch ran'\ntR.", "save the model as safetensors"),
    "long header": ("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}", "header would have"),
    "far": ("model.safetensors", tensor([2], [0, 1 << 50]), "do not fit"),
    "before": ("model.safetensors", tensor([2], [-8, 0]), "do not fit"),
    "large": ("model.safetensors", tensor([1 << 40, 1 << 40], [0, 8]), "do not fit"),
    "nested": ("model.safetensors", safetensors(b"[" * 100_000), "recursion"),
    "elsewhere": (
        "model.safetensors.index.json",
        json.dumps({"weight_map": {"a": "../other.safetensors", "b": "/etc/passwd"}}).encode(),
        "is no file of the folder",
    ),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and code, and beside it a plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    (tmp_path / "p.json").write_text(plan(*GOOD["drop"][0]).text(), encoding="utf-8")
    configure(tmp_path / "model")
    return tmp_path / "model"


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **CODE, **changes}))


@pytest.mark.parametrize("name", FILES)
def test_files_that_lie(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, sentence = FILES[name]
    (folder / file).write_bytes(content)
    assert main(["apply", "p.json", str(folder), "-o", "out"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1
    assert not Path("ran").exists() and not Path("out").exists()


def test_code_that_comes_along_is_never_run(folder: Path) -> None:
    import compressor
    from profiler.capture.loading import load_config

    assert type(load_config(folder)).__module__.startswith("transformers.")
    configure(folder, model_type="evil")
    (folder / "model.safetensors").write_bytes(tensor([2], [0, 8]))
    assert main(["inspect", str(folder)]) == 2
    with pytest.raises(ModelError, match="is never run"):
        compressor.load(folder)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_experts", 10**9), ("num_hidden_layers", 10**9), ("hidden_size", 10**12), ("num_experts_per_tok", 1e300),
     ("vocab_size", float("inf"))],
)  # fmt: skip
def test_sizes_that_cannot_be(folder: Path, field: str, value: float, capsys: pytest.CaptureFixture[str]) -> None:
    import compressor
    from profiler.capture.loading import load_config

    configure(folder, **{field: value})
    (folder / "model.safetensors").write_bytes(tensor([2], [0, 8]))
    began = time.process_time()
    for command in (["inspect", str(folder)], ["apply", "p.json", str(folder), "-o", "out"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"cannot be: {field} is" in said and len(said.splitlines()) == 1
    for load in (load_config, compressor.load):
        with pytest.raises(ModelError, match=f"{field} is"):
            load(folder)
    with pytest.raises(ModelError, match=f"{field} is"):
        require_plausible({"text_config": {field: value}}, "a part")
    assert time.process_time() - began < 10
