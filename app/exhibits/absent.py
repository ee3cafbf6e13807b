"""Why a run cannot fill an exhibit: the sentences that pages, report and command line share."""

from __future__ import annotations

import shlex

import store
from app.exhibits.exhibit import Absent


def require(what: str, run: store.Run, *subjects: str) -> None:
    """Refuse where the source of an imported run lacks one of the subjects (table ``omission``).

    Args:
        what: what the exhibit shows, as the beginning of a sentence.

    Raises:
        Absent: the first subject that is missing, with the reason.
    """
    missing = next((subject for subject in subjects if subject in run.omissions), None)
    if missing is not None:
        raise Absent(f"{what} cannot be computed from what was imported: {run.omissions[missing].rstrip('.')}.")


def not_yet(what: str, run: store.Run) -> Absent:
    """For figures that need derived metrics which are not there."""
    if run.live:
        return Absent(f"{what} is computed from the whole trace when the collection ends.")
    if not run.has_trace and not run.metrics().is_empty():  # computing them again would change nothing
        return Absent(
            f"{what} needs selections token by token, and this run holds counts alone (collected with `--no-trace`, or "
            "imported as counts)."
        )
    return Absent(
        f"{what} has not been computed for this run: the metrics beside it are missing. Compute them from the run "
        "alone:",
        remedy=f"moescope runs compute {shlex.quote(store.shown(run.path))}",
    )


def needs_level(what: str, level: str, run: store.Run) -> Absent:
    """For figures that need another level of collection, or a model where the run was imported."""
    require(what, run, "outputs")
    return Absent(
        f"{what} needs the level {level}; this run recorded {run.info.levels}. Collect again:",
        remedy=f"moescope collect MODEL --data PATH --level routing,{level}",
    )
