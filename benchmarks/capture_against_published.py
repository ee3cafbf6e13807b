"""The extra time and memory of recording, against the published ways of getting the same figures.

    python -m benchmarks.capture_against_published [--rounds 7] [--dtype float32] [--threads 1]

A random OLMoE of 8 layers, width 256, 32 experts, top-4 (E / k = 8), on batches of 8 sequences of 256 tokens; rounds
are interleaved, processor time counts. "extra" is the time over the bare forward of the same model. Peak memory is that
of a process of its own per variant, over the bare one's. Bounds: the extra time of routing and activations at most a
quarter of the all-experts observer's; one pass with gradients at most 0.8 of the two passes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.published import (
    hook_down_projections,
    loss_of,
    observe_all_experts,
    tiny_olmoe,
    two_passes,
    with_separate_experts,
)

ACTIVATIONS, GRADIENTS = "routing,activations", "routing,gradients"
OTHERS = ("routing", "routing,similarity", "routing,lookahead", "routing,attention", "routing,moments")
PUBLISHED = ("all experts", "separate, bare", "separate, hooked", "two passes")
VARIANTS = ("bare", *OTHERS, ACTIVATIONS, GRADIENTS, *PUBLISHED)
QUARTER, FOUR_FIFTHS = 0.25, 0.8


def make(name: str, dtype: torch.dtype, stack: ExitStack) -> Callable[[], object]:
    """What runs one batch of a variant."""
    from profiler import watch

    model = tiny_olmoe(dtype=dtype)
    ids = torch.randint(3, 1000, (8, 256), generator=torch.Generator().manual_seed(0))

    def forward(of: torch.nn.Module) -> None:
        with torch.no_grad():
            of(input_ids=ids, use_cache=False)

    if name.startswith("routing"):
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        session = watch(model, store=folder, name="run", level=name, flush_seconds=float("inf"))
        stack.enter_context(session.attached())
        if name == GRADIENTS:
            return lambda: loss_of(model, ids).backward()
        return lambda: forward(model)
    if name == "all experts":
        _, remove = observe_all_experts(model)
        stack.callback(remove)
        return lambda: forward(model)
    if name == "bare":
        return lambda: forward(model)
    unfused = with_separate_experts(model)
    if name == "two passes":
        return lambda: two_passes(unfused, ids)
    if name == "separate, hooked":
        _, remove = hook_down_projections(unfused)
        stack.callback(remove)
    return lambda: forward(unfused)


def seconds(names: tuple[str, ...], dtype: torch.dtype, rounds: int) -> dict[str, NDArray[np.float64]]:
    """(rounds,) processor seconds of each variant, in interleaved rounds after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        work = {name: make(name, dtype, stack) for name in names}
        for turn in range(rounds + 1):
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                begin = time.process_time()
                work[name]()
                if turn:
                    times[name].append(time.process_time() - begin)
    return {name: np.array(values) for name, values in times.items()}


def peak_mib(name: str, dtype: str) -> float:
    """Peak resident memory of a process that runs three batches of a variant."""
    command = [sys.executable, "-m", "benchmarks.capture_against_published", "--only", name, "--dtype", dtype]
    root = Path(__file__).parents[1]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout.split()[-1])


def own_peak_mib() -> float:
    """Peak resident memory of this process; ru_maxrss would begin at the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Print one row per variant and the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    if options.only:
        with ExitStack() as stack:
            work = make(options.only, dtype, stack)
            for _ in range(3):
                work()
        print(own_peak_mib())
        return
    times = seconds(VARIANTS, dtype, options.rounds)
    memory = {name: peak_mib(name, options.dtype) for name in VARIANTS}
    extra = {name: times[name] - times["bare"] for name in (*OTHERS, ACTIVATIONS, "all experts")}
    extra["separate, hooked"] = times["separate, hooked"] - times["separate, bare"]
    print(f"{'variant':<22}{'median ms':>10}{'extra ms':>10}{'peak MiB over bare':>20}")
    for name in VARIANTS:
        more = f"{np.median(extra[name]) * 1e3:>10.0f}" if name in extra else " " * 10
        print(f"{name:<22}{np.median(times[name]) * 1e3:>10.0f}{more}{memory[name] - memory['bare']:>20.0f}")
    ratio("extra time, activations / all experts", extra[ACTIVATIONS], extra["all experts"], QUARTER)
    both = extra["all experts"] + extra["separate, hooked"]
    ratio("extra time, activations / both published", extra[ACTIVATIONS], both, QUARTER)
    ratio("time, one pass with gradients / two passes", times[GRADIENTS], times["two passes"], FOUR_FIFTHS)


def ratio(what: str, ours: NDArray[np.float64], theirs: NDArray[np.float64], limit: float) -> None:
    """Print the ratio of medians with the 95 % interval of resampled rounds."""
    picks = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    low, high = np.quantile(np.median(ours[picks], 1) / np.median(theirs[picks], 1), [0.025, 0.975])
    value = np.median(ours) / np.median(theirs)
    print(f"{what}: {value:.3f} [{low:.3f}, {high:.3f}], bound {limit}{'' if value <= limit else '   OVER'}")


if __name__ == "__main__":
    main()
