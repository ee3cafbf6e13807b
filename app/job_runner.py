"""The process of a job: ``python -m app.job_runner JOB.json``. It says how far it is in a file of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import store
from app.jobs import Job, read


def main(arguments: Sequence[str]) -> int:
    """Run the commands of a job file, one after the other, until one fails."""
    from app.cli import main as moescope
    from app.progress import Stoppable

    with Stoppable() as stoppable:
        job = read(Path(arguments[0]))
        code, step = 0, 1
        try:
            for step, command in enumerate(job.commands, 1):
                _say(job, state="running", step=step)
                code = moescope(command)
                if code:
                    break
        except KeyboardInterrupt:  # between two commands
            code = 130
            print("moescope: interrupted", file=sys.stderr)
        except SystemExit as error:  # an option that a command has not
            code = error.code if isinstance(error.code, int) else 2
        except BaseException:
            if not stoppable.stopped:
                code = 1
                raise
            code = 130  # the signal came amid something that its own clean-up could not mend
            print("moescope: interrupted", file=sys.stderr)
        finally:
            ended = "done" if not code else "stopped" if stoppable.stopped or code == 130 else "failed"
            _say(job, state=ended, step=step, code=code)
    return code


def _say(job: Job, **what: object) -> None:
    store.write_plan(job.run, json.dumps(what) + "\n", kind="progress", name=job.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
