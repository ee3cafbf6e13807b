"""A real run with experts on disk and a cache in memory, against the times that the link timeline predicts.

    python benchmarks/offloading.py --folder DIR                     about four minutes, 5.6 GB on DIR's disk
    python benchmarks/offloading.py --folder DIR --machine FILE      also predicts from moescope measure-device alone

32 experts (4 layers x 8) of 3 x 2048 x 7168 32-bit weights lie on disk and are read past the page cache (O_DIRECT): 176
MB each, as much as an expert of Mixtral-8x7B takes in 8 bits. An LRU cache per layer holds some of them; a token's
experts are multiplied with numpy, one thread, when all are there. Tokens select experts as those of the bundled run do
in its first four layers, its 16 experts taken in pairs. Every cache size runs ``--repeats`` times; the time of a pass
is the median of these. Outputs must be the same at every size.

Two numbers, the seconds of a read and of an expert, are fitted to the passes of two sizes; replay and timeline predict
the milliseconds per token of the others. Files are removed at the end.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import mmap
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import store
from planner.machine import Link
from planner.machines import machine
from planner.simulate.replay import replay
from planner.simulate.timeline import StepCosts, timeline
from planner.simulate.workload import Workload, decode

LAYERS, EXPERTS, HIDDEN, INNER = 4, 8, 2048, 7168
WEIGHTS = 3 * HIDDEN * INNER
SIZE = 4 * WEIGHTS
REQUEST = 8 << 20
SIZES = (2, 3, 4, 5, 6, 7)
FITTED = (2, 7)
RUN = Path(__file__).resolve().parents[1] / "sample_data" / "runs" / "sample.duckdb"
Floats = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to read from")
    parser.add_argument("--tokens", type=int, default=30, help="per cache size and repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--machine", type=Path, help="of moescope measure-device")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if shutil.disk_usage(arguments.folder).free < 1.5 * LAYERS * EXPERTS * SIZE:
        raise SystemExit(f"{arguments.folder} has no room for {LAYERS * EXPERTS * SIZE / 1e9:.1f} GB")
    work = routing(arguments.tokens)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="moescope-offloading-") as folder:
        write_experts(Path(folder))
        measured = measure(work, Path(folder), arguments.repeats)
    figures = predict(work, measured, arguments.machine)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def routing(tokens: int) -> Workload:
    """Selections of the bundled run: whole sequences' beginnings, three domains in turn, experts in pairs."""
    with store.open_run(RUN) as run:
        trace = run.selections()
    domains = list(dict.fromkeys(trace.domains))[:3]
    chosen = [trace.domains.index(name) for name in domains]
    part = -(-tokens // len(chosen))
    ids = np.concatenate([trace.ids[:LAYERS, one, :part] for one in chosen], axis=1)[:, :tokens] // 2
    ids[..., 1] = np.where(ids[..., 1] == ids[..., 0], -1, ids[..., 1])  # both of a pair are one expert
    return decode(selections=ids[:, None], num_experts=EXPERTS)


def write_experts(folder: Path) -> None:
    """One file per expert: the same random numbers, each from another place on."""
    start = time.perf_counter()
    numbers = np.random.default_rng(0).standard_normal(WEIGHTS, np.float32) / np.float32(np.sqrt(HIDDEN))
    for number in range(LAYERS * EXPERTS):
        cut = 1_000_003 * number % WEIGHTS
        with (folder / f"{number}.bin").open("wb") as file:
            file.write(numbers[cut:].data)
            file.write(numbers[:cut].data)
            file.flush()
            os.fsync(file.fileno())
    print(f"{LAYERS * EXPERTS} experts of {SIZE / 1e6:.0f} MB written in {time.perf_counter() - start:.0f} s")


class Engine:
    """Experts on disk, an LRU cache per layer in memory, products in numpy."""

    def __init__(self, folder: Path, slots: int, room: mmap.mmap) -> None:
        self.files = [os.open(folder / f"{one}.bin", os.O_RDONLY | os.O_DIRECT) for one in range(LAYERS * EXPERTS)]
        self.view, self.room = memoryview(room), room
        self.caches: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(LAYERS)]  # expert -> place in memory
        self.free = [[layer * slots + one for one in range(slots)] for layer in range(LAYERS)]
        self.loads = 0

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.view.release()

    def step(self, layer: int, needed: list[int], tokens: Floats) -> Floats:
        """Load what is missing, then multiply."""
        cache, free = self.caches[layer], self.free[layer]
        for expert in needed:
            if expert in cache:
                cache.move_to_end(expert)
        for expert in needed:
            if expert not in cache:
                if not free:
                    free.append(cache.pop(next(one for one in cache if one not in needed)))
                cache[expert] = self._read(layer * EXPERTS + expert, free.pop())
        for expert in needed:  # the order of use is the order of need, as in the replay
            cache.move_to_end(expert)
        return sum((self._multiply(cache[expert], tokens) for expert in needed), np.zeros_like(tokens))

    def _read(self, number: int, place: int) -> int:
        self.loads += 1
        at = place * SIZE
        done = 0
        while done < SIZE:
            end = min(done + REQUEST, SIZE)
            done += os.preadv(self.files[number], [self.view[at + done : at + end]], done)
        return place

    def _multiply(self, place: int, tokens: Floats) -> Floats:
        weights = np.frombuffer(self.room, np.float32, WEIGHTS, place * SIZE).reshape(3, -1)
        gate, up = (part.reshape(INNER, HIDDEN) @ tokens for part in weights[:2])
        result: Floats = weights[2].reshape(HIDDEN, INNER) @ (gate / (1 + np.exp(-gate)) * up)
        return result


def measure(work: Workload, folder: Path, repeats: int) -> dict[int, dict[str, Any]]:
    """Seconds of every pass at every cache size, and the loads of each."""
    room = mmap.mmap(-1, LAYERS * max(SIZES) * SIZE)
    np.frombuffer(room, np.uint8)[::4096] = 0  # touched once, so that no page is missing later
    found: dict[int, dict[str, Any]] = {slots: {"seconds": [], "loads": []} for slots in SIZES}
    outputs: Floats | None = None
    for repeat in range(repeats):
        for slots in SIZES:
            engine = Engine(folder, slots, room)
            seconds, loads, results = [], [], []
            for at in range(work.num_passes):
                state = np.ones(HIDDEN, np.float32)
                start, before = time.perf_counter(), engine.loads
                for layer in range(LAYERS):
                    needed = [int(one) for one in work.ids[layer, at] if one >= 0]
                    state = state + engine.step(layer, needed, state)
                    state /= np.sqrt(np.mean(state**2)) + np.float32(1e-6)
                seconds.append(time.perf_counter() - start)
                loads.append(engine.loads - before)
                results.append(state)
            engine.close()
            if outputs is None:
                outputs = np.array(results)
            assert np.array_equal(outputs, np.array(results)), "a cache gave other weights than the disk"
            found[slots]["seconds"].append(seconds)
            found[slots]["loads"] = loads
            print(
                f"repeat {repeat + 1}, {slots} slots per layer: {1e3 * np.mean(seconds):6.1f} ms/token,"
                f" {sum(loads)} reads"
            )
    for one in found.values():
        one["spread"] = [float(1e3 * np.mean(run)) for run in one["seconds"]]
        one["seconds"] = np.median(one["seconds"], axis=0)
    return found


def predict(work: Workload, measured: dict[int, dict[str, Any]], file: Path | None) -> dict[str, Any]:
    """Fit on two sizes, predict all."""
    uses = work.needed.sum(axis=0)
    rows = np.concatenate([np.stack([measured[slots]["loads"], uses], axis=1) for slots in FITTED]).astype(float)
    times = np.concatenate([measured[slots]["seconds"] for slots in FITTED])
    (read, expert), *_ = np.linalg.lstsq(rows, times, rcond=None)
    print(
        f"\nfitted on {FITTED[0]} and {FITTED[1]} slots: {1e3 * read:.1f} ms per read ({SIZE / read / 1e9:.2f} GB/s),"
    )
    print(f"{1e3 * expert:.1f} ms per expert ({SIZE / expert / 1e9:.1f} GB/s)\n")
    figures: dict[str, Any] = {"read_seconds": float(read), "expert_seconds": float(expert), "rows": []}
    links = {"fitted": (Link("disk", SIZE / read, 0.0), float(expert))}
    if file is not None:
        own = machine(file=file)
        assert own.disk is not None, "the machine's file has no disk"
        links["device"] = (own.disk, own.cpu.seconds(SIZE, WEIGHTS, 1))
    shape = (LAYERS, work.num_passes)
    for slots in SIZES:
        outcome = replay(work, policy="lru", slots=slots)
        assert outcome.missing.sum(axis=0).tolist() == measured[slots]["loads"], "the replay loads other experts"
        mine = 1e3 * float(np.mean(measured[slots]["seconds"]))
        row: dict[str, Any] = {"slots": slots, "hit_rate": outcome.hit_rate, "measured_ms": mine,
                               "repeats_ms": measured[slots]["spread"], "used_to_fit": slots in FITTED}  # fmt: skip
        text = f"{slots} slots, {outcome.hit_rate:4.0%} hits: measured {mine:6.1f} ms/token"
        for name, (link, seconds) in links.items():
            costs = StepCosts(
                dense=np.zeros(shape), expert=np.full(shape, seconds), tail=np.zeros(shape[1]),
                size=np.full((LAYERS, EXPERTS), float(SIZE)),
            )  # fmt: skip
            told = timeline(work, outcome, costs, link=link, overlap=False).ms_per_token
            row[f"{name}_ms"], row[f"{name}_error"] = told, told / mine - 1
            text += f", {name} {told:6.1f} ({told / mine - 1:+.1%})"
        print(text + (", used to fit" if slots in FITTED else ""))
        figures["rows"].append(row)
    others = [abs(row["fitted_error"]) for row in figures["rows"] if not row["used_to_fit"]]
    figures["worst_error"] = max(others)
    print(f"\nworst error at the {len(others)} sizes that were not used: {max(others):.1%}")
    return figures


if __name__ == "__main__":
    main()
