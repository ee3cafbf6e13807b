"""Two single-threaded workers against one, what the merge takes, and workers that are killed at random moments.

    python benchmarks/workers.py [--tokens 240k] [--rounds 3] [--kills 20] [--level LEVEL] [--hidden H] [--seed 0]

The same corpus, the same machine, a Ray of this machine, one thread per worker. The model is the bundled one with its
texts; ``--hidden`` makes a random one of that width, with 16 experts of half of it in each of 6 layers: the bundled one
is so small that a forward costs hardly more than writing down what it did. Rounds take turns. Three times are told
apart:

- steady: tokens per second from when all workers have loaded the model until one has no more to do;
- whole: from the start of Ray to the run file, with processes that begin, and models that load;
- merge: from the last shard to the run file.

``--kills``: so many collections of a part of the text with two workers, of which one is killed (SIGKILL) at a moment
drawn evenly over the time that an undisturbed one takes; each result is compared with the undisturbed one, table by
table. A collection that was over before its moment is compared too, and does not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import store
from app.commands.options import positive

BAR_WORKERS, BAR_MERGE = 1.7, 0.01


def main() -> None:
    """Measure, and say which bars are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=240_000, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--level", default="routing,activations")
    parser.add_argument("--hidden", type=positive, metavar="H", help="a random model of that width")
    parser.add_argument("--part-tokens", type=positive, metavar="T")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of --kills")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(timed(arguments, int(arguments.stage))))
        return
    if arguments.rounds:
        speeds(arguments)
    if arguments.kills:
        kills(arguments)


def speeds(arguments: argparse.Namespace) -> None:
    """One worker and two, in turns."""
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for number in range(arguments.rounds):
        for workers in (1, 2) if number % 2 == 0 else (2, 1):
            one = _stage(workers)
            found[workers].append(one)
            print(
                f"round {number + 1}, {workers} worker(s): {one['steady']:,.0f} tokens/s steady, {one['whole']:.1f} s"
                f" whole, {one['collecting']:.1f} s collecting, {one['merge']:.2f} s merge",
                flush=True,
            )
    steady = [two["steady"] / one["steady"] for one, two in zip(found[1], found[2], strict=True)]
    whole = [one["whole"] / two["whole"] for one, two in zip(found[1], found[2], strict=True)]
    merge = [one["merge"] / one["collecting"] for one in found[2]]
    _tell("two workers against one, steady", steady, "x", statistics.median(steady) >= BAR_WORKERS)
    _tell("two workers against one, whole", whole, "x", None)
    _tell("merge, of collecting with two workers", [100 * share for share in merge], " %", max(merge) < BAR_MERGE)


def _tell(what: str, values: list[float], unit: str, met: bool | None) -> None:
    verdict = "" if met is None else (": met" if met else ": NOT met")
    spread = f"{min(values):.2f} to {max(values):.2f}"
    print(f"{what}: {statistics.median(values):.2f}{unit} ({spread} over {len(values)} rounds){verdict}", flush=True)


def _stage(workers: int) -> dict[str, float]:
    """Each collection in a process of its own, as a user's would be."""
    command = [sys.executable, *sys.argv, "--stage", str(workers)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **threads})
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


# One collection


def timed(arguments: argparse.Namespace, workers: int) -> dict[str, float]:
    """Collect with so many workers, and time the stages."""
    from moescope import cluster

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        order = prepared(arguments, arguments.tokens, Path(folder))
        with cluster.connected("local", workers=workers) as joined:
            clock = Clock(workers)
            with clock.watching():
                collect(joined, order, Path(folder))
        return {
            "whole": time.monotonic() - began,
            "steady": clock.speed,
            "collecting": clock.collected - clock.first_ready,
            "merge": clock.merged - clock.collected,
        }


def prepared(arguments: argparse.Namespace, tokens: int, folder: Path) -> dict[str, Any]:
    """What :func:`collect` passes on: corpus, tokenizer, model, options."""
    from profiler import load_tokenizer
    from profiler.capture.levels import RecordingOptions, parse_levels
    from profiler.corpus import open_corpus
    from sample_data import MODEL, TEXTS

    tokenizer = load_tokenizer(MODEL)
    texts = repeated(sorted(TEXTS.glob("*.jsonl")), tokens, folder)
    corpus = open_corpus(texts, tokenizer=tokenizer, sequence_length=512, batch_size=8, token_budget=tokens)
    load = functools.partial(bundled) if arguments.hidden is None else functools.partial(wide, arguments.hidden)
    return {
        "load_model": load,
        "corpus": corpus,
        "tokenizer": tokenizer,
        "options": RecordingOptions(levels=parse_levels(arguments.level)),
        "part_tokens": arguments.part_tokens,
    }


def repeated(texts: list[Path], tokens: int, folder: Path) -> dict[str, str] | list[str]:
    """The texts, in another order again and again where they hold too few tokens (four bytes each, at most)."""
    size = sum(path.stat().st_size for path in texts)
    times = -(-tokens * 8 // size)
    if times <= 1:
        return [str(path) for path in texts]
    target = folder / "texts"
    target.mkdir()
    for path in texts:
        lines = path.read_text(encoding="utf-8").splitlines()
        with (target / path.name).open("w", encoding="utf-8") as file:
            for number in range(times):
                random.Random(number).shuffle(lines)
                file.writelines(f"{line}\n" for line in lines)
    return sorted(str(path) for path in target.iterdir())


def bundled() -> Any:
    """The model that comes with moescope."""
    from profiler import load_model
    from sample_data import MODEL

    return load_model(MODEL, dtype="float32", device="cpu")


def wide(hidden: int) -> Any:
    """A random model of that width, with the bundled one's vocabulary."""
    import torch
    import transformers

    from sample_data import MODEL

    config = transformers.AutoConfig.from_pretrained(MODEL)
    config.update({"hidden_size": hidden, "intermediate_size": hidden // 2, "num_attention_heads": 8})
    config.update({"num_key_value_heads": 8, "num_experts_per_tok": 4})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def collect(joined: Any, order: dict[str, Any], folder: Path, name: str = "run") -> Path:
    """One run, without metrics: they are no part of collecting."""
    from profiler.workers import collect_on_ray

    given = dict(order)
    load = given.pop("load_model")
    return collect_on_ray(joined, load, name=name, store=folder, headline=False, **given)


class Clock:
    """Watches a collection from inside its driver.

    Attributes:
        first_ready, collected, merged: when the first worker had loaded the model, the last shard was there, the run
            file was there.
        pids: of workers that are ready.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.first_ready = self.collected = self.merged = 0.0
        self.pids: list[int] = []
        self._all: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None

    @property
    def speed(self) -> float:
        """Tokens per second while all workers worked."""
        assert self._all is not None and self._last is not None, "all workers were ready at one time"
        return (self._last[1] - self._all[1]) / (self._last[0] - self._all[0])

    def watching(self) -> Any:
        """While entered, collections of this process are timed."""
        from contextlib import ExitStack
        from unittest import mock

        from profiler.workers.job import WorkersJob
        from profiler.workers.worker import Ready

        hear, finish = WorkersJob._hear, WorkersJob._finish

        def heard(job: Any, crew: Any, member: Any, said: Any) -> None:
            hear(job, crew, member, said)
            now = time.monotonic()
            if isinstance(said, Ready):
                self.pids.append(said.pid)
                self.first_ready = self.first_ready or now
            working = sum(one.part is not None for one in crew.members)
            if working == self.workers:
                self._all = self._all or (now, job._tokens)
                self._last = (now, job._tokens)

        def finished(job: Any, crew: Any) -> Path:
            self.collected = time.monotonic()
            path: Path = finish(job, crew)
            self.merged = time.monotonic()
            return path

        stack = ExitStack()
        stack.enter_context(mock.patch.object(WorkersJob, "_hear", heard))
        stack.enter_context(mock.patch.object(WorkersJob, "_finish", finished))
        return stack


# Killed workers


def kills(arguments: argparse.Namespace) -> None:
    """Collections in which a worker dies, against one in which none does."""
    from moescope import cluster

    generator, differing, hit = random.Random(arguments.seed), [], 0
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        order = prepared(arguments, max(4096, arguments.tokens // 8), folder)
        order["part_tokens"] = order["part_tokens"] or max(1024, arguments.tokens // 200)
        with cluster.connected("local", workers=2) as joined:
            clock = Clock(2)
            with clock.watching():
                undisturbed = collect(joined, order, folder, "undisturbed")
            lasts = clock.collected - clock.first_ready
            number = 0
            while hit < arguments.kills and number < 3 * arguments.kills:
                number += 1
                moment = generator.uniform(0, lasts)
                path, killed = collect_and_kill(joined, order, folder, f"kill-{number}", moment, generator)
                found = differences(path, undisturbed)
                hit += killed
                differing += [f"run {number}: {name}" for name in found]
                state = "identical" if not found else f"DIFFERS in {', '.join(found)}"
                where = f"after {moment:.1f} of {lasts:.1f} s" if killed else "too late: it was over"
                print(f"run {number}: {where}, {state}", flush=True)
                path.unlink()
    print(
        f"{number} runs, a worker killed in {hit} of them: {differing or 'all identical'}",
        flush=True,
    )


def collect_and_kill(
    joined: Any, order: dict[str, Any], folder: Path, name: str, moment: float, generator: random.Random
) -> tuple[Path, bool]:
    """One run of which a worker is killed so many seconds after the first one was ready; whether it was."""
    clock, killed = Clock(2), threading.Event()

    def kill() -> None:
        while not clock.first_ready:
            time.sleep(0.01)
        time.sleep(moment)
        try:
            os.kill(generator.choice(clock.pids), signal.SIGKILL)
            killed.set()
        except ProcessLookupError:
            pass

    with clock.watching():
        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        path = collect(joined, order, folder, name)
        over = killed.is_set()
        thread.join()
    return path, over


def differences(mine: Path, theirs: Path) -> list[str]:
    """Columns in which two runs differ: selections, counts, text at all, 64-bit sums by more than 1e-12 of themselves
    and of the largest, 32-bit ones by more than a neighbour."""
    found = []
    with store.open_run(mine) as one, store.open_run(theirs) as other:
        for name, table in store.tables().items():
            if name in ("run", "check"):
                continue
            keys = list(table.keys) or [key for key in ("layer", "step", "sequence", "start") if _has(table, key)]
            first, second = (run.table(name).sort(keys, nulls_last=True) for run in (one, other))
            found += [f"{name}.{column}" for column in first.columns if not _equal(first[column], second[column])]
    return found


def _has(table: Any, name: str) -> bool:
    return any(column.name == name for column in table.columns)


def _equal(first: pl.Series, second: pl.Series) -> bool:
    if len(first) != len(second) or not first.is_null().equals(second.is_null()):
        return False
    if isinstance(first.dtype, pl.List):
        if not first.list.len().equals(second.list.len()):
            return False
        first, second = first.explode(), second.explode()
    if first.dtype not in (pl.Float32, pl.Float64):
        return first.equals(second)
    a, b = (values.drop_nulls().to_numpy() for values in (first, second))
    if a.dtype == np.float32:
        return bool(np.all((a == b) | (np.isnan(a) & np.isnan(b)) | (np.nextafter(a, b) == b)))
    scale = float(np.nanmax(np.abs(b), initial=0.0))
    return bool(np.allclose(a, b, rtol=1e-12, atol=1e-12 * scale, equal_nan=True))


if __name__ == "__main__":
    main()
