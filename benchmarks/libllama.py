"""Logits of a checkpoint by llama.cpp itself: its own converter, then its C interface (llama.h).

    python -m benchmarks.libllama LIBRARY FILE.gguf TOKENS.json LOGITS.npy

Both run in processes of their own: llama.cpp ends the process over a file that it cannot hold. Keys and values are kept
in float32 and attention is not fused: with the engine's defaults (float16) small differences turn the choice of experts
where two are nearly level, and hide whether both engines compute the same function.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKAGES = ("xllamacpp", "llama_cpp")  # Python packages that bring llama.cpp along
# The converter knows tokenizers by a checksum, and not the bundled one, which splits text as this one of its list does.
CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda model, tokenizer: "smollm"
script = sys.argv[1] + "/convert_hf_to_gguf.py"
sys.argv[:2] = [script]
runpy.run_path(script, run_name="__main__")
"""
FLOAT32, FLOAT16, AUTOMATIC, OFF = 0, 1, -1, 0  # of enum ggml_type and of enum llama_flash_attn_type


class Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = [
        ("count", c_int32),
        ("token", POINTER(c_int32)),
        ("embedding", c_void_p),
        ("position", POINTER(c_int32)),
        ("sequences", POINTER(c_int32)),
        ("sequence", POINTER(POINTER(c_int32))),
        ("wanted", POINTER(c_int8)),
    ]


class ContextParameters(ctypes.Structure):
    """The beginning of struct llama_context_params; what follows is carried along as it is, whatever its length."""

    _fields_ = [
        ("context", c_uint32),
        ("batch", c_uint32),
        ("physical_batch", c_uint32),
        ("more_sizes", c_uint32 * 4),
        ("threads", c_int32 * 2),
        ("kinds", c_int32 * 4),
        ("flash_attention", c_int32),
        ("rope", c_float * 6),
        ("rope_context", c_uint32),
        ("defragment", c_float),
        ("callback", c_void_p * 2),
        ("key_type", c_int32),
        ("value_type", c_int32),
        ("rest", c_uint8 * 1024),
    ]


class ModelParameters(ctypes.Structure):
    """struct llama_model_params, carried along as it is."""

    _fields_ = [("all", ctypes.c_uint64 * 128)]


def find_library() -> Path | None:
    """The shared library that an installed Python package brings; None without one."""
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        for folder in (found.submodule_search_locations or []) if found else []:
            for pattern in ("lib/libllama.*", "*.so", "*.dylib"):
                for path in sorted(Path(folder).glob(pattern)):
                    return path
    return None


def logits(library: Path, model: Path, tokens: list[int]) -> NDArray[np.float32]:
    """(tokens, vocabulary) float32: what llama.cpp computes for one sequence, every position, on the CPU.

    Raises:
        SystemExit: the library is of another version, or does not load the model; with its own last words.
    """
    call = _Calls(library)
    loaded = call.llama_model_load_from_file(str(model).encode(), call.llama_model_default_params())
    if not loaded:
        raise SystemExit(f"llama.cpp does not load {model.name}: {call.last_words()}")
    parameters = call.llama_context_default_params()
    stated = (parameters.flash_attention, parameters.key_type, parameters.value_type)
    if stated != (AUTOMATIC, FLOAT16, FLOAT16):
        raise SystemExit(
            f"{library.name} lays out its parameters in another way than this script: take llama.cpp b11549"
        )
    parameters.context = parameters.batch = parameters.physical_batch = max(256, len(tokens))
    parameters.flash_attention, parameters.key_type, parameters.value_type = OFF, FLOAT32, FLOAT32
    context = call.llama_init_from_model(loaded, parameters)
    batch = call.llama_batch_init(len(tokens), 0, 1)
    batch.count = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.position[place], batch.sequences[place] = token, place, 1
        batch.sequence[place][0], batch.wanted[place] = 0, 1
    if not context or call.llama_decode(context, batch):
        raise SystemExit(f"llama.cpp does not run {model.name}: {call.last_words()}")
    width = call.llama_vocab_n_tokens(call.llama_model_get_vocab(loaded))
    return np.ctypeslib.as_array(call.llama_get_logits(context), (len(tokens), width)).copy()


class _Calls:
    """The functions of llama.h that are used, with their types; the engine's log is kept, not printed."""

    def __init__(self, library: Path) -> None:
        self._library, self._log = ctypes.CDLL(str(library)), [""]
        logger = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
        self._logger = logger(lambda level, text, _: self._log.append(text.decode(errors="replace")))
        self._declare("llama_log_set", None, logger, c_void_p)(self._logger, None)
        self._declare("llama_backend_init", None)()
        self._declare("llama_model_default_params", ModelParameters)
        self._declare("llama_model_load_from_file", c_void_p, c_char_p, ModelParameters)
        self._declare("llama_model_get_vocab", c_void_p, c_void_p)
        self._declare("llama_vocab_n_tokens", c_int32, c_void_p)
        self._declare("llama_context_default_params", ContextParameters)
        self._declare("llama_init_from_model", c_void_p, c_void_p, ContextParameters)
        self._declare("llama_batch_init", Batch, c_int32, c_int32, c_int32)
        self._declare("llama_decode", c_int32, c_void_p, Batch)
        self._declare("llama_get_logits", POINTER(c_float), c_void_p)

    def _declare(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, arguments
        setattr(self, name, function)
        return function

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} is not declared")

    def last_words(self) -> str:
        """The last line that says what went wrong."""
        lines = "".join(self._log).splitlines()
        return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")


@dataclass(frozen=True)
class Engine:
    """llama.cpp: its converter's folder, its library, and how weights are stored."""

    folder: Path
    library: Path
    outtype: str

    def logits(self, checkpoint: Path, ids: list[int]) -> NDArray[np.float32] | str:
        """(tokens, vocabulary), or the words with which a checkpoint was refused."""
        with tempfile.TemporaryDirectory() as folder:
            file, listed, result = (Path(folder) / name for name in ("model.gguf", "tokens.json", "logits.npy"))
            listed.write_text(json.dumps(ids))
            output = ["--outtype", self.outtype, "--outfile", str(file)]
            words = _run(["-c", CONVERT, str(self.folder), str(checkpoint), *output])
            if words is not None:
                return f"converter: {words}"
            words = _run(["-m", "benchmarks.libllama", str(self.library), str(file), str(listed), str(result)])
            return f"engine: {words}" if words is not None else np.load(result)


def _run(arguments: list[str]) -> str | None:
    """None, or the last words of a process that failed."""
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}  # an assertion that fails would call a debugger
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
    return None if done.returncode == 0 else lines[-1]


def main() -> None:
    """Write the logits of a list of tokens."""
    library, model, tokens, target = map(Path, sys.argv[1:])
    np.save(target, logits(library, model, json.loads(tokens.read_text())))


if __name__ == "__main__":
    main()
