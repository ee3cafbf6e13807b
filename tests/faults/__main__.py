"""``python -m tests.faults --kills 200``: kill the work that writes files at random moments, and see what is left.

Half of the kills fall at a moment drawn evenly from the time that the work takes undisturbed, the other half right
before one of the changes that it makes to files, so that short windows are hit too.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from tests.faults.applying import Applying  # noqa: E402
from tests.faults.collecting import Collecting  # noqa: E402
from tests.faults.compacting import Compacting  # noqa: E402
from tests.faults.killing import Harm, run_child  # noqa: E402
from tests.faults.reporting import Reporting  # noqa: E402
from tests.faults.subject import Subject  # noqa: E402

SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    kind.name: kind for kind in (Collecting, Compacting, Applying, Reporting)
}
SHOWN = 5
"""Harms told in full per subject."""


def main() -> int:
    """Kill as asked; 1 where anything was lost, damaged or unequal."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="of each kind of work (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(SUBJECTS), action="append", help="this kind of work alone")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="kinds of work at a time (default 2)")
    options = parser.parse_args()
    _preload()
    with tempfile.TemporaryDirectory(prefix="moescope-faults-") as directory:
        harmed = _side_by_side(options.only or list(SUBJECTS), Path(directory), options)
    print("nothing lost, nothing damaged, nothing unequal" if not harmed else f"{' AND '.join(harmed)} CAME TO HARM")
    return 1 if harmed else 0


def _side_by_side(names: list[str], folder: Path, options: argparse.Namespace) -> list[str]:
    """Kill several kinds of work at a time, each in a process of its own; the kinds that came to harm."""
    waiting, running, harmed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _alone(name, folder, options)
            running[pid] = name
        pid, status = os.wait()
        name = running.pop(pid)
        print((folder / f"{name}.txt").read_text(), end="", flush=True)
        harmed += [name] if status else []
    return harmed


def _alone(name: str, folder: Path, options: argparse.Namespace) -> None:
    """One kind of work in a process that ends with it; what it prints goes to a file."""
    code = 1
    with (folder / f"{name}.txt").open("w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
        try:
            chance = random.Random(f"{name} {options.seed}")
            code = 1 if _try_out(SUBJECTS[name], folder / name, options.kills, chance) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _preload() -> None:
    """Import what children would spend their time on; nothing of it may start a thread."""
    import scipy.stats  # noqa: F401
    import sklearn  # noqa: F401
    from numba.core.registry import cpu_target

    import app.commands.report
    import app.report.html  # noqa: F401
    import profiler.headline  # noqa: F401
    from app import exhibits

    exhibits.entries()
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()


def _try_out(make: Callable[[Path], Subject], folder: Path, kills: int, chance: random.Random) -> int:
    """Kill one kind of work so often; the number of kills that did harm."""
    began, spent = time.monotonic(), _spent()
    subject = make(folder / "shared")
    _must(lambda say: subject.prepare(folder), folder)
    trial = folder / "trial"
    subject.begin(trial)
    whole = _must(lambda say: subject.work(trial, say), trial)
    shutil.rmtree(trial)
    stages: Counter[str] = Counter()
    harms: list[str] = []
    harmed = missed = 0
    while stages.total() < kills:
        moment = chance.random() * whole.seconds
        harm = Harm(seconds=moment) if chance.random() < 0.5 else Harm(change=chance.randint(1, whole.changes))
        subject.begin(trial)
        outcome = run_child(lambda say: subject.work(trial, say), trial, harm)
        if outcome.error:
            raise RuntimeError(f"{subject.name} failed by itself:\n{outcome.error}")
        if not outcome.killed:  # it was quicker this time
            missed += 1
            shutil.rmtree(trial)
            if missed > 10 * kills:
                raise RuntimeError(f"{subject.name} always ends before it can be killed")
            continue
        told = _judge(subject, trial, outcome.said, stages)
        harmed += bool(told)
        harms += [f"{harm}: {line}" for line in told]
        shutil.rmtree(trial, ignore_errors=True)
    print(
        f"{subject.name:<11}{kills:>5} kills, {harmed} did harm; {time.monotonic() - began:.0f} s, "
        f"{_spent() - spent:.0f} s of processors; undisturbed {whole.seconds:.2f} s, {whole.changes} changes of files"
    )
    for stage, count in sorted(stages.items()):
        print(f"{'':<11}{count:>5} {stage}")
    for line in harms[:SHOWN]:
        print(f"    ! {line}")
    sys.stdout.flush()
    return harmed


def _judge(subject: Subject, trial: Path, said: list[Any], stages: Counter[str]) -> list[str]:
    """What came to harm by one kill."""

    def see(say: Callable[[Any], None]) -> None:
        say({"stage": subject.stage(trial)})
        say({"told": [*subject.look(trial, said), *subject.again(trial)]})

    outcome = run_child(see, trial)
    stage = next((one["stage"] for one in outcome.said if "stage" in one), "not looked at")
    stages[stage] += 1
    told = next((one["told"] for one in outcome.said if "told" in one), [])
    if outcome.error:
        told.append(f"({stage}) failed afterwards: {outcome.error.strip().splitlines()[-1]}")
    return [f"({stage}) {line}" if not line.startswith("(") else line for line in told]


def _spent() -> float:
    """Seconds of processors that this process and its children have taken."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _must(work: Callable[[Callable[[Any], None]], None], folder: Path) -> Any:
    """Work that nobody disturbs, in a child.

    Raises:
        RuntimeError: it failed.
    """
    outcome = run_child(work, folder)
    if outcome.error:
        raise RuntimeError(f"work that nobody disturbed failed:\n{outcome.error}")
    return outcome


if __name__ == "__main__":
    sys.exit(main())
