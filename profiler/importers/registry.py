"""The formats that can be imported, in the order of lists. A new one is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from moescope.errors import InputError
from profiler.importers.recording import ImportOptions, Recording


@dataclass(frozen=True)
class Format:
    """One format: its name, where it comes from, what PATH is, what a run of it can say, and the reader's module."""

    name: str
    source: str
    path: str
    gives: str
    module: str
    function: str = "read"

    @property
    def read(self) -> Callable[[Path, ImportOptions], Recording]:
        """The reader: opens a path lazily; raises ImportFileError where it is not of this format."""
        return cast("Callable[[Path, ImportOptions], Recording]", getattr(import_module(self.module), self.function))


FORMATS: tuple[Format, ...] = (
    Format("npz", "any tool", "FILE.npz", "trace, weights, labels", "profiler.importers.npz"),
    Format("csv", "any tool", "FILE.csv[.gz]", "trace (token,layer,slot,expert,weight) or counts (layer,expert)",
           "profiler.importers.csv"),
    Format("sglang-stat", "SGLang", "RECORDER.pt", "counts per step", "profiler.importers.sglang", "read_stat"),
    Format("sglang-per-pass", "SGLang", "RECORDER.pt or a folder of ranks", "counts per forward pass",
           "profiler.importers.sglang", "read_per_pass"),
    Format("sglang-per-token", "SGLang", "RECORDER.pt of one rank", "trace, token ids",
           "profiler.importers.sglang", "read_per_token"),
    Format("sglang-responses", "SGLang", "FILE.jsonl of responses", "trace", "profiler.importers.responses",
           "read_sglang"),
    Format("vllm", "vLLM", "FILE.jsonl of responses, .npy, .npz", "trace, token ids where given",
           "profiler.importers.responses", "read_vllm"),
    Format("tensorrt-llm", "TensorRT-LLM", "folder of statistics", "counts per iteration",
           "profiler.importers.tensorrt_llm"),
    Format("imatrix", "llama.cpp", "FILE.gguf of llama-imatrix", "counts", "profiler.importers.imatrix"),
    Format("megatron", "Megatron Core", "router_trace_rank0.jsonl", "counts per step", "profiler.importers.megatron"),
)  # fmt: skip


def format_named(name: str) -> Format:
    """The format called ``name``.

    Raises:
        InputError: there is none; the message lists those that are.
    """
    for one in FORMATS:
        if one.name == name:
            return one
    raise InputError(f"no import format {name!r}; there are {', '.join(one.name for one in FORMATS)}")
