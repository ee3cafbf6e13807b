"""A checkpoint of 8 GB profiled layer by layer in 3 GiB: time and memory, and the same figures as from memory.

    python benchmarks/layer_stream.py [--gigabytes 8] [--tokens 8192] [--levels LEVEL ...] [--threads 1] [--twin]
                                      [--cold] [--folder DIR]

The checkpoint is a random OLMoE in bfloat16, 128 experts of width 256 beside a hidden size of 512, with as many layers
as the size asks for, in files of 1 GB. It is written to a temporary folder first and removed at the end. Baseline, in
the same run: the files read from first to last into one buffer, and the forwards of the same text through the same
layers, loaded one by one in the same way, without a recorder; reading for the latter is not counted. Each stage runs in
its own process, so that its peak of memory is its own; both clocks are shown, for machines that others use too.
``--twin`` then collects with the whole model in memory and compares every table: the trace exactly, sums to 1e-6.
``--cold`` has the files leave the page cache before each stage.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MEMORY_LIMIT, TIME_LIMIT = 3.0, 1.5
HIDDEN, WIDTH, EXPERTS, TOP_K, FILE_BYTES = 512, 256, 128, 8, 1e9
LAYER_BYTES = 2 * (EXPERTS * 3 * HIDDEN * WIDTH + EXPERTS * HIDDEN + 4 * HIDDEN**2 + 4 * HIDDEN)


def main() -> None:
    """Run the stages one after the other and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of text, in batches of 2 x 512")
    parser.add_argument("--levels", nargs="+", default=["routing", "routing,activations"], help="comma lists of levels")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--twin", action="store_true", help="collect the last level from memory too, and compare")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each stage")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(STAGES[arguments.stage](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        arguments.folder = Path(folder)
        written = _stage("write", arguments)
        print(f"{written['gigabytes']:.1f} GB in {written['files']} files, {written['layers']} layers", flush=True)
        read, bare = _stage("read", arguments), _stage("forward", arguments)
        for level in arguments.levels:
            streamed = _stage("stream", arguments, level)
            for clock in ("seconds", "processor"):
                baseline = read[clock] + bare[clock]
                print(f"{clock}: read {read[clock]:.1f} + bare forwards {bare[clock]:.1f} = {baseline:.1f}")
                _print(level, clock, streamed[clock], baseline * TIME_LIMIT, f"{streamed[clock] / baseline:.2f}x")
            expected = f"{streamed['expected']:.2f} GiB were expected"
            _print(level, "GiB at the peak", streamed["peak"], MEMORY_LIMIT, expected)
        if arguments.twin:
            whole = _stage("whole", arguments, arguments.levels[-1])
            print(f"from memory: {whole['seconds']:.1f} s, peak {whole['peak']:.1f} GiB; {whole['compared']}")


def _print(level: str, what: str, value: float, limit: float, detail: str) -> None:
    verdict = "" if value <= limit else f"   OVER {limit:.2f}"
    print(f"{level}, streamed, {what}: {value:.2f} ({detail}){verdict}", flush=True)


def _stage(name: str, arguments: argparse.Namespace, level: str = "routing") -> Any:
    """Run one stage in a process of its own."""
    if arguments.cold:
        _leave_cache(arguments.folder)
    words = ["--tokens", str(arguments.tokens), "--levels", level, "--gigabytes", str(arguments.gigabytes)]
    words += ["--threads", str(arguments.threads), "--folder", str(arguments.folder), "--stage", name]
    command = [sys.executable, "-P", __file__, *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _leave_cache(folder: Path) -> None:
    for path in folder.glob("model/*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# The stages


def write(arguments: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint, its tokenizer and a text."""
    from safetensors.torch import save_file
    from transformers import OlmoeConfig

    layers = max(2, round(arguments.gigabytes * 1e9 / LAYER_BYTES))
    folder = arguments.folder / "model"
    tokenizer = _tokenizer()
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=1024,
        dtype="bfloat16",
        architectures=["OlmoeForCausalLM"],
        eos_token_id=1,
        pad_token_id=None,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    outside = {"model.embed_tokens.weight": _random(len(tokenizer), HIDDEN), "model.norm.weight": _ones(HIDDEN)}
    tensors = {**outside, "lm_head.weight": _random(len(tokenizer), HIDDEN)}
    index: dict[str, str] = {}
    number = 0
    for layer in range(layers):
        tensors |= _layer(f"model.layers.{layer}.")
        if sum(tensor.nbytes for tensor in tensors.values()) >= FILE_BYTES or layer == layers - 1:
            name = f"model-{number:05d}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, name)
            tensors, number = {}, number + 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    words = [f"{random.Random(place).random():.6f}" for place in range(arguments.tokens)]
    (arguments.folder / "text.txt").write_text(" ".join(words))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"gigabytes": size / 1e9, "files": number, "layers": layers}


def read(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds to read all files in order, into one buffer."""
    buffer = memoryview(bytearray(16 << 20))
    begin = _clocks()
    for path in sorted((arguments.folder / "model").glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return _spent(begin)


def forward(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the forwards through layers that are loaded one after the other, without a recorder."""
    from profiler.capture.discovery import inspect_model
    from profiler.stream.checkpoint import Checkpoint
    from profiler.stream.hidden import InMemory
    from profiler.stream.parts import Parts
    from profiler.stream.relay import Relay
    from profiler.stream.skeleton import build_skeleton

    folder = arguments.folder / "model"
    model = build_skeleton(folder)
    checkpoint = Checkpoint(folder, model, torch.device("cpu"))
    parts, relay, states = Parts(model, checkpoint), Relay(inspect_model(model).stack), InMemory()
    checkpoint.load(parts.outside)
    batches = [
        (torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
        for batch in _corpus(arguments).batches()
    ]
    spent = {"seconds": 0.0, "processor": 0.0}
    for index in range(model.config.num_hidden_layers):
        checkpoint.load(parts.layer(index))
        with relay.working(index), torch.no_grad():
            for number, (ids, mask) in enumerate(batches):
                relay.entering = states.get(number) if index else None
                begin = _clocks()
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
                for clock, seconds in _spent(begin).items():
                    spent[clock] += seconds
                if relay.passed_on is not None:
                    states.put(number, relay.passed_on)
        checkpoint.unload(parts.layer(index))
    return spent


def stream(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds from the corpus to the finished run, and the peak of the process."""
    import store
    from profiler.stream import collect_streamed

    corpus = _corpus(arguments)
    begin = _clocks()
    path = collect_streamed(
        arguments.folder / "model",
        corpus=corpus,
        name=f"streamed-{arguments.levels[0].replace(',', '-')}",
        tokenizer=_tokenizer(),
        store=arguments.folder / "runs",
        level=arguments.levels[0],
        memory_limit=f"{MEMORY_LIMIT}GiB",
        headline=False,
    )
    spent = _spent(begin)
    with store.open_run(path) as run:
        expected = run.info.settings["layer_stream"]["expected_bytes"] / (1 << 30)
    return {**spent, "peak": _peak(), "expected": expected}


def whole(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same collection with the whole model in memory, and whether the two runs say the same."""
    from profiler import load_model
    from profiler.collect import collect

    begin = time.perf_counter()
    model = load_model(arguments.folder / "model", device="cpu")
    collect(
        model,
        corpus=_corpus(arguments),
        name="whole",
        tokenizer=_tokenizer(),
        store=arguments.folder / "runs",
        level=arguments.levels[0],
        headline=False,
        flush_seconds=1e9,  # vectors are rounded to 32 bits in each shard, and the streamed run has one per layer
    )
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak": _peak(), "compared": _compared(arguments.folder / "runs", arguments.levels[0])}


STAGES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "write": write,
    "read": read,
    "forward": forward,
    "stream": stream,
    "whole": whole,
}


def _compared(runs: Path, level: str) -> str:
    import polars as pl
    from polars.testing import assert_frame_equal

    import store
    from store.schema import tables

    order = ("name", "layer", "step", "kind", "expert", "domain", "phase", "sequence", "start", "token_id")
    names = (f"streamed-{level.replace(',', '-')}", "whole")
    first, second = (store.open_run(runs / f"{name}.duckdb") for name in names)
    rows = 0
    for table in tables():
        if table == "run":
            continue
        frames = [run.table(table) for run in (first, second)]
        if table == "check":  # memory is another one
            frames = [frame.filter(~pl.col("name").str.contains("memory")) for frame in frames]
        keys = [name for name in order if name in frames[0].columns]
        ordered = [frame.sort(keys) for frame in frames]
        if table == "route_chunk":
            assert_frame_equal(*(frame.select(pl.exclude("weights", "scale")) for frame in ordered), check_exact=True)
        assert_frame_equal(*ordered, rel_tol=1e-6, abs_tol=1e-9)
        rows += len(ordered[0])
    same = first.info.model_fingerprint == second.info.model_fingerprint
    return f"{rows:,} rows of {len(tables()) - 1} tables are equal, fingerprints {'too' if same else 'DIFFER'}"


def _corpus(arguments: argparse.Namespace) -> Any:
    from profiler.corpus import open_corpus

    return open_corpus(
        [arguments.folder / "text.txt"],
        tokenizer=_tokenizer(),
        sequence_length=512,
        batch_size=2,
        token_budget=arguments.tokens,
    )


def _tokenizer() -> Any:
    """One token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _layer(prefix: str) -> dict[str, torch.Tensor]:
    """One decoder layer as OLMoE stores it: expert by expert."""
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    tensors = {f"{attention}{name}_proj.weight": _random(HIDDEN, HIDDEN) for name in "qkvo"}
    tensors |= {f"{attention}{name}_norm.weight": _ones(HIDDEN) for name in "qk"}
    tensors |= {f"{prefix}{name}_layernorm.weight": _ones(HIDDEN) for name in ("input", "post_attention")}
    tensors[f"{mlp}gate.weight"] = _random(EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
            tensors[f"{mlp}experts.{expert}.{name}_proj.weight"] = _random(*shape)
    return tensors


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16) * 0.05


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bfloat16)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _spent(begin: tuple[float, float]) -> dict[str, float]:
    """Seconds on the wall and of all processors since then."""
    wall, processor = _clocks()
    return {"seconds": wall - begin[0], "processor": processor - begin[1]}


def _peak() -> float:
    """GiB, the largest resident set of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / (1 << 20)


if __name__ == "__main__":
    main()
