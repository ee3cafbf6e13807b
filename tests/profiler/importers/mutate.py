"""Mutated import files: each is refused in one line or read to a run that agrees with itself, and nothing else.

    python -P -m tests.profiler.importers.mutate --count 10000 --seed 0

Bytes are flipped, cut out, doubled and overwritten, lengths are edited, in the files as they stand and, where those are
archives, inside of their members, with checksums made right again. A case fails if it ends in any error but
ImportFileError, in more than one line, in more than a minute or two gigabytes, if it starts a process, opens a socket
or unpickles, or if it leaves anything but a finished run.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import store
from moescope.errors import ImportFileError
from profiler.importers.job import import_run
from profiler.importers.recording import ImportOptions
from tests.profiler.importers import fixtures
from tests.profiler.importers.fixtures import CONFIG, REPLICAS
from tests.profiler.importers.traces import arrays, write_npz

SECONDS = 60
BYTES = 2 << 30
_FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class"}


@dataclass(frozen=True)
class Seed:
    """A sound file of one format; ``inside``: where damage goes, for a folder."""

    format: str
    path: Path
    config: dict[str, Any]
    target: Path


def seeds(folder: Path) -> list[Seed]:
    """One sound file for each layout that is read."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    ids = np.argsort(generator.random((6, 3, 4)), axis=-1)[..., :2].astype(np.int32)
    ids[:, 0] = -1
    counts = generator.integers(1, 9, (4, 3, 4), dtype=np.int32)
    counts[:, 0] = 0
    replicas = generator.integers(1, 9, (3, 6))
    replicas[0] = 0
    one_pass = {"forward_pass_id": 1, "rank": 0, "gatherer_key": "primary", "global_physical_count": replicas}
    per_token = fixtures.record(ids=ids.transpose(1, 0, 2), input_ids=range(6), positions=range(6), lengths=[6])
    mapped = {"last_physical_to_logical_map": REPLICAS}
    rows = [(token, layer, slot, int(ids[token, layer, slot]), 0.5) for token in range(6) for layer in (1, 2)
            for slot in (0, 1)]  # fmt: skip
    lines = "token,layer,slot,expert,weight\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    few = "layer,expert\n" + "".join(f"{layer},{expert}\n" for _, layer, _, expert, _ in rows)
    (folder / "trace.csv").write_text(lines)
    (folder / "uses.csv").write_text(few)
    (folder / "trace.csv.gz").write_bytes(gzip.compress(lines.encode()))
    np.save(folder / "ids.npy", ids)
    ranks = fixtures.tensorrt_llm(folder / "ranks", [{"0_1": counts[0, 1], "0_2": counts[0, 2], "1_1": counts[1, 1]}])
    found = [
        ("npz", write_npz(folder / "trace.npz", arrays(lengths=(3, 9))), {}),
        ("csv", folder / "trace.csv", CONFIG),
        ("csv", folder / "uses.csv", CONFIG),
        ("csv", folder / "trace.csv.gz", CONFIG),
        ("sglang-stat", fixtures.torch_file(folder / "stat.pt", {"rank": 0, "logical_count": counts}), CONFIG),
        ("sglang-per-pass", fixtures.torch_file(folder / "pass.pt", {"records": [one_pass], **mapped}), CONFIG),
        ("sglang-per-token", fixtures.torch_file(folder / "token.pt", {"records": [per_token], **mapped}), CONFIG),
        ("sglang-responses", fixtures.jsonl(folder / "sglang.jsonl", [fixtures.sglang_response(
            np.maximum(ids, 0), prompt_tokens=2)]), CONFIG),
        ("vllm", fixtures.jsonl(folder / "vllm.jsonl", [
            {"prompt_token_ids": list(range(3)), "prompt_routed_experts": ids[:3].tolist(),
             "choices": [{"token_ids": [7, 8, 9, 1], "routed_experts": fixtures.encoded(ids[3:])}]}]), CONFIG),
        ("vllm", folder / "ids.npy", CONFIG),
        ("imatrix", fixtures.imatrix(folder / "imatrix.gguf", {1: [5, 0, 2, 9], 2: [1, 1, 1, 1]}), CONFIG),
    ]  # fmt: skip
    result = [Seed(name, path, config, path) for name, path, config in found]
    result += [Seed("tensorrt-llm", ranks, CONFIG, ranks / name) for name in ("rank0.safetensors", "meta_info.json")]
    megatron = folder / "router_trace_rank0.jsonl"
    megatron.write_text(_megatron())
    return [*result, Seed("megatron", megatron, CONFIG, megatron)]


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """The bytes with one or two changes."""
    for _ in range(int(generator.integers(1, 3))):
        if data:
            data = _CHANGES[int(generator.integers(len(_CHANGES)))](data, generator)
    return data


def mutated_file(path: Path, generator: np.random.Generator) -> bytes:
    """A changed copy of a file; of an archive, half of the time, with a changed member and sound checksums."""
    data = path.read_bytes()
    if generator.random() < 0.5:
        return mutated(data, generator)
    if path.suffix == ".gz":
        return gzip.compress(mutated(gzip.decompress(data), generator))
    if path.suffix in (".npz", ".pt"):
        return _with_changed_member(data, generator)
    return mutated(data, generator)


def judged(seed: Seed, directory: Path) -> str:
    """Import one file: "read", "refused", or what went wrong."""
    seen: list[str] = []
    with _watched(seen):
        try:
            options = ImportOptions(config=seed.config)
            path = import_run(
                seed.format, seed.path, directory=directory, name="mutant", options=options, metrics=False
            )
        except ImportFileError as error:
            text = str(error)
            left = [one.name for one in directory.iterdir()] if directory.exists() else []
            if "\n" in text or "more memory than there is" in text or left or seen:
                return f"refused wrongly: {text!r} {left} {seen}"
            return "refused"
        except TimeoutError:
            return f"took more than {SECONDS} s"
        except BaseException:
            return traceback.format_exc()
    return _agrees(path, seen)


def run_mutations(
    count: int, seed: int, *, tell: Callable[[str], None] | None = None
) -> tuple[Counter[str], list[str]]:
    """How many mutants were read and refused, and a line for each that went wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = seeds(folder / "seeds")
        for one in sound:  # also loads compiled code from its cache, which unpickles
            outcome = judged(one, folder / "sound" / one.target.name)
            assert outcome == "read" or "numba" in outcome, f"{one.target}: {outcome}"
        for number in range(count):
            original = sound[number % len(sound)]
            generator = np.random.default_rng((seed, number))
            copy = _copied(original, folder / "mutants")
            copy.target.write_bytes(mutated_file(original.target, generator))
            outcome = judged(copy, folder / "runs")
            known = outcome in ("read", "refused")
            outcomes[f"{original.format} {outcome if known else 'WRONG'}"] += 1
            if not known:
                wrong.append(f"{number} ({original.format}, {original.target.name}): {outcome}")
            shutil.rmtree(folder / "runs", ignore_errors=True)
            shutil.rmtree(folder / "mutants")
            if tell is not None and number % 500 == 499:
                tell(f"{number + 1} of {count}, {len(wrong)} wrong, {time.perf_counter() - started:.0f} s")
    return outcomes, wrong


def _copied(original: Seed, folder: Path) -> Seed:
    folder.mkdir()
    if original.path.is_dir():
        shutil.copytree(original.path, folder / original.path.name)
    path = folder / original.path.name
    target = path / original.target.name if original.path.is_dir() else path
    return Seed(original.format, path, original.config, target)


def _agrees(path: Path, seen: list[str]) -> str:
    """Whether a run's counts are those of its trace."""
    with store.open_run(path) as run:
        for layer in run.layers if run.has_trace else ():
            ids = run.layer_selections(layer=layer.layer).ids
            counted = np.bincount(ids[ids >= 0].astype(np.int64), minlength=layer.num_experts)
            load = np.zeros(layer.num_experts, np.int64)
            table = run.table("expert_load")
            for number, expert, tokens in table.select("layer", "expert", "tokens").iter_rows():
                load[expert] += tokens if number == layer.layer else 0
            if not np.array_equal(counted, load):
                return f"layer {layer.layer}: trace {counted.tolist()}, counts {load.tolist()}"
    left = [one.name for one in path.parent.iterdir() if one != path]
    return f"left {left} {seen}" if left or seen else "read"


def _megatron() -> str:
    ids = [[0, 2], [1, 2], [0, 3]]
    lines = [
        {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0, "num_tokens": 3,
         "topk": 2, "top_indices": ids}
        for step in range(3) for layer in (1, 2)
    ]  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def _flip(data: bytes, generator: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in generator.integers(len(data), size=int(generator.integers(1, 9))):
        changed[place] ^= 1 << int(generator.integers(8))
    return bytes(changed)


def _cut(data: bytes, generator: np.random.Generator) -> bytes:
    return data[: int(generator.integers(len(data)))]


def _drop(data: bytes, generator: np.random.Generator) -> bytes:
    low = int(generator.integers(len(data)))
    return data[:low] + data[low + int(generator.integers(1, 65)) :]


def _double(data: bytes, generator: np.random.Generator) -> bytes:
    low = int(generator.integers(len(data)))
    return data[:low] + data[low : low + int(generator.integers(1, 65))] + data[low:]


def _number(data: bytes, generator: np.random.Generator) -> bytes:
    """A length becomes one that no file has."""
    form, values = [("<I", (0, 1, 0x7FFFFFFF, 0xFFFFFFFF)), ("<Q", (0, 1 << 31, 1 << 40, (1 << 64) - 1)),
                    ("<H", (0, 0xFFFF))][int(generator.integers(3))]  # fmt: skip
    raw = struct.pack(form, values[int(generator.integers(len(values)))])
    low = int(generator.integers(max(len(data) - len(raw), 1)))
    return data[:low] + raw + data[low + len(raw) :]


def _digits(data: bytes, generator: np.random.Generator) -> bytes:
    """A number in text becomes a large, a negative or a fractional one."""
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return data
    low = places[int(generator.integers(len(places)))]
    new = (b"99999999999999999999", b"-7", b"0.5", b"1e400", b"null", b'"', b"[", b"NaN")
    return data[:low] + new[int(generator.integers(len(new)))] + data[low + 1 :]


_CHANGES = (_flip, _flip, _cut, _drop, _double, _number, _number, _digits)


def _with_changed_member(data: bytes, generator: np.random.Generator) -> bytes:
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    infos = source.infolist()
    chosen = int(generator.integers(len(infos)))
    with zipfile.ZipFile(target, "w") as archive:
        for index, info in enumerate(infos):
            content = source.read(info)
            archive.writestr(info.filename, mutated(content, generator) if index == chosen else content)
    return target.getvalue()


_HOOK: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _FORBIDDEN:
        _HOOK[-1].append(f"{event} {str(arguments):.100}")


@contextmanager
def _watched(seen: list[str]) -> Iterator[None]:
    """Note forbidden events, and bound time and memory."""

    def late(*_: Any) -> None:
        raise TimeoutError

    if not _HOOK:
        _HOOK.append([])  # what happens outside of an import is nobody's fault
        sys.addaudithook(_audit)
    _HOOK.append(seen)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + BYTES, before[1]))
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)
        _HOOK.pop()


def _data_bytes() -> int:
    """Bytes of memory that count against the limit already."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Run the mutations and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes, wrong = run_mutations(options.count, options.seed, tell=lambda line: print(line, flush=True))
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:7,}  {outcome}")
    for line in wrong[:20]:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
