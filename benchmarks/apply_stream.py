"""Memory and speed of applying a plan to a checkpoint, against copying the same files.

    python -m benchmarks.apply_stream [--gigabytes 8] [--rounds 5] [--shards 16] [--folder DIR]

A synthetic checkpoint with the names and shapes of OLMoE (experts of 2048 x 1024, bfloat16, as many layers as the size
asks for) in many files; the plan drops a quarter of the experts of every layer. Rounds are interleaved, files are in
the page cache, and both ways end with fsync of every file. The reference is ``shutil.copyfile`` of all files. Speed
counts bytes of the source per second, as every byte is either carried on or left out on purpose; bytes written per
second stand beside it. Memory is that of a process of its own, over what it takes once everything is imported.

Bounds: at most one file of the source + 1 GiB of memory; at least 60 % of the speed of copying.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from compressor.plan import DropLayer, DropStep, Estimate, LayerShape, Plan, Provenance, Source, Target

HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY = 2048, 1024, 64, 8, 50304
LEAST_SPEED, MORE_MEMORY = 0.6, 2**30

_MEASURE = """
import sys, torch, compressor, compressor.apply, compressor.edits.layer
from compressor.plan import Plan
plan = Plan.load(sys.argv[1])
def memory(line):
    return 1024 * next(int(text.split()[1]) for text in open("/proc/self/status") if text.startswith(line))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew here
before = memory("VmRSS:")
compressor.apply(plan, source=sys.argv[2], destination=sys.argv[3])
print(memory("VmHWM:") - before)
"""


def layer_tensors(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one decoder layer."""
    root = f"model.layers.{layer}"
    yield f"{root}.input_layernorm.weight", (HIDDEN,)
    for expert in range(EXPERTS):
        yield f"{root}.mlp.experts.{expert}.down_proj.weight", (HIDDEN, WIDTH)
        yield f"{root}.mlp.experts.{expert}.gate_proj.weight", (WIDTH, HIDDEN)
        yield f"{root}.mlp.experts.{expert}.up_proj.weight", (WIDTH, HIDDEN)
    yield f"{root}.mlp.gate.weight", (EXPERTS, HIDDEN)
    yield f"{root}.post_attention_layernorm.weight", (HIDDEN,)
    for name in ("k_norm", "q_norm"):
        yield f"{root}.self_attn.{name}.weight", (HIDDEN,)
    for name in ("k_proj", "o_proj", "q_proj", "v_proj"):
        yield f"{root}.self_attn.{name}.weight", (HIDDEN, HIDDEN)


def synthesize(folder: Path, size: int, shards: int) -> int:
    """Write the checkpoint; its number of layers."""
    per_layer = sum(2 * _count(shape) for _, shape in layer_tensors(0))
    layers = max(round((size - 4 * VOCABULARY * HIDDEN) / per_layer), 1)
    tensors: list[tuple[str, tuple[int, ...]]] = [("lm_head.weight", (VOCABULARY, HIDDEN))]
    tensors.append(("model.embed_tokens.weight", (VOCABULARY, HIDDEN)))
    tensors += [tensor for layer in range(layers) for tensor in layer_tensors(layer)]
    tensors.append(("model.norm.weight", (HIDDEN,)))
    total = sum(2 * _count(shape) for _, shape in tensors)
    noise, place = os.urandom(2**24), 0
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(shards)]
    for name, shape in tensors:
        groups[min(place * shards // total, shards - 1)].append((name, shape))
        place += 2 * _count(shape)
    groups = [group for group in groups if group]
    index = {}
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        _write(folder / file, group, noise)
        index.update({name: file for name, _ in group})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    config = {
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDTH,
        "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "num_attention_heads": 16, "num_key_value_heads": 16, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _write(path: Path, tensors: list[tuple[str, tuple[int, ...]]], noise: bytes) -> None:
    header, place = {}, 0
    for name, shape in tensors:
        size = 2 * _count(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        while place:
            place -= stream.write(noise[: min(place, len(noise))])


def quarter(layers: int) -> Plan:
    """A plan that drops every fourth expert."""
    shapes = tuple(LayerShape(layer=layer, num_experts=EXPERTS, top_k=TOP_K, width=WIDTH) for layer in range(layers))
    gone = tuple(DropLayer(layer=layer, experts=tuple(range(layer % 4, EXPERTS, 4))) for layer in range(layers))
    return Plan(
        provenance=Provenance(run="synthetic", tool_version="0"),
        source=Source(
            model="synthetic",
            model_type="olmoe",
            hidden_size=HIDDEN,
            expert_size=HIDDEN,
            num_layers=layers,
            layers=shapes,
        ),
        target=Target(share=0.25, preset="synthetic"),
        steps=(DropStep(method="every fourth", layers=gone),),
        estimate=Estimate(
            expert_parameters=4,
            expert_parameters_after=3,
            active_parameters=1,
            active_parameters_after=1,
            bytes_saved=0,
        ),
    ).checked()


def copy_all(source: Path, target: Path) -> float:
    """Seconds of copying all weight files, each made durable."""
    target.mkdir()
    began = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint, 10^9 bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    import compressor

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        source = root / "source"
        source.mkdir()
        plan = quarter(synthesize(source, int(options.gigabytes * 1e9), options.shards))
        plan.save(root / "plan.json")
        files = sorted(source.glob("*.safetensors"))
        size, largest = sum(path.stat().st_size for path in files), max(path.stat().st_size for path in files)
        _warm(files)
        copying, applying, after = [], [], 0
        for _ in range(options.rounds):
            copying.append(copy_all(source, root / "copy"))
            shutil.rmtree(root / "copy")
            receipt = compressor.apply(plan, source=source, destination=root / "result")
            applying.append(receipt.seconds)
            after = receipt.bytes_after
            shutil.rmtree(root / "result")
        arguments = [str(root / "plan.json"), str(source), str(root / "result")]
        command = [sys.executable, "-c", _MEASURE, *arguments]
        memory = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return report(size, after, largest, len(files), copying, applying, memory)


def _warm(files: list[Path]) -> None:
    for path in files:
        with open(path, "rb", buffering=0) as stream:
            while stream.read(2**24):
                pass


def report(
    size: int, after: int, largest: int, files: int, copying: list[float], applying: list[float], memory: int
) -> int:
    """Print the figures; 0 where both bounds hold."""
    copy, own = statistics.median(copying), statistics.median(applying)
    speed, room = copy / own, largest + MORE_MEMORY
    print(f"source {size / 1e9:.2f} GB in {files} files of at most {largest / 1e9:.2f} GB; result {after / 1e9:.2f} GB")
    print(
        f"copying   {copy:6.2f} s  {size / copy / 1e9:5.2f} GB/s          ({min(copying):.2f} to {max(copying):.2f} s)"
    )
    print(
        f"applying  {own:6.2f} s  {size / own / 1e9:5.2f} GB/s of source, {after / own / 1e9:5.2f} GB/s written"
        f" ({min(applying):.2f} to {max(applying):.2f} s)"
    )
    print(f"speed relative to copying {speed:.2f}; bound {LEAST_SPEED}: {'kept' if speed >= LEAST_SPEED else 'MISSED'}")
    print(
        f"memory beyond the imports {memory / 2**20:.0f} MiB; bound {room / 2**20:.0f} MiB:"
        f" {'kept' if memory <= room else 'MISSED'}"
    )
    return 0 if speed >= LEAST_SPEED and memory <= room else 1


if __name__ == "__main__":
    sys.exit(main())
