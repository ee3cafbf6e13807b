"""Published methods by taxonomy, and whether a run has what each needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import polars as pl

import store
from app.methods import CLASSES, Method, address
from app.methods import methods as every
from moescope.errors import PlanError
from planner.source import source_of

_SCHEMA = {
    "level": pl.String,
    "group": pl.String,
    "method": pl.String,
    "paper": pl.String,
    "here": pl.String,
    "where": pl.String,
    "needs": pl.String,
    "available": pl.Boolean,
    "reason": pl.String,
}

_SUBJECTS = ("trace", "order", "weights", "logits", "text", "scores")


def methods(run: store.Run) -> pl.DataFrame:
    """One row per method, and one for each class of the survey that has none.

    Columns: level (model | system | hardware | analysis), group (class of the survey), method, paper, here (what it is
    in moescope; ``not here`` for what is not built), where (page, command or file of docs), needs (of a run), available
    (this run has it), reason (why not, or what of the method is here; may be empty).
    """
    have = _Have(run)
    found = every()
    rows = [_row(one, have, run) for one in found]
    filled = {(one.level, one.group) for one in found}
    rows += [
        (level, group, "", "", "not here", "", "", False, "nothing of this class is built")
        for level, group in CLASSES
        if (level, group) not in filled
    ]
    order: dict[object, int] = {known: index for index, known in enumerate(CLASSES)}
    rows.sort(key=lambda row: order[row[0], row[1]])
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")


def _row(one: Method, have: _Have, run: store.Run) -> tuple[object, ...]:
    lacks = "" if one.here == "not here" else next((said for need in one.needs if (said := have.lacks(need))), "")
    lacks = lacks or have.refuses(one.where)
    available = one.here != "not here" and not lacks
    return (
        one.level, one.group, one.name, one.paper, one.here, address(one.where),
        ", ".join(one.needs).replace("|", " or "), available, lacks or one.remark,
    )  # fmt: skip


class _Have:
    """What a run has of the things that methods need; each is looked up once."""

    def __init__(self, run: store.Run) -> None:
        self._run = run
        self._known: dict[str, str] = {}

    def lacks(self, need: str) -> str:
        """Why the run has not what is needed, as a sentence without the full stop; empty where it has."""
        if need not in self._known:
            self._known[need] = self._look(need)
        return self._known[need]

    def refuses(self, where: str) -> str:
        """Why the planner makes no such plan of the run, though the run has all that was asked; empty where it does."""
        return self._without_source if where.partition(":")[0] in ("preset", "place", "policy", "prefetch") else ""

    @cached_property
    def _without_source(self) -> str:
        try:
            source_of(self._run)
        except PlanError as error:
            return str(error).rstrip(".")
        return ""

    def _look(self, need: str) -> str:
        run = self._run
        if need in HAVE:
            return "" if HAVE[need](run) else f"not in this run's model: {need}"
        if need in BESIDE:
            return BESIDE[need]
        if need in _SUBJECTS:
            return self._subject(need)
        levels = need.split("|")
        if set(levels) & {level.strip() for level in run.info.levels.split(",")}:
            return ""
        if "outputs" in run.omissions:
            return run.omissions["outputs"].rstrip(".")
        return f"needs level {' or '.join(levels)}; this run recorded {run.info.levels}"

    def _subject(self, need: str) -> str:
        run = self._run
        if need in run.omissions:
            return run.omissions[need].rstrip(".")
        if need in ("trace", "order") and not run.has_trace:
            return "this run holds no trace"
        if need == "scores" and not run.has_scores:
            return "this run keeps no router scores: collect it again with --router-scores"
        return "this run keeps no text" if need == "text" and not run.has_tokens else ""


def _kinds(run: store.Run) -> bool:
    return bool(run.table("expert").filter(pl.col("kind").is_in(["zero", "copy", "constant"])).height)


def _borrowed(run: store.Run) -> bool:
    return bool(run.table("expert").filter(pl.col("owner_layer") != pl.col("layer")).height)


def _varies(run: store.Run) -> bool:
    width = pl.DataFrame(
        [(one.layer, one.step, one.top_k) for one in run.layers], schema=["layer", "step", "top_k"], orient="row"
    )
    used = run.table("router_load").join(width.cast({"layer": pl.Int32, "step": pl.Int32}), on=["layer", "step"])
    return bool(used.filter(pl.col("selections") < pl.col("tokens") * pl.col("top_k")).height)


HAVE: dict[str, Callable[[store.Run], bool]] = {
    "shared experts": lambda run: any(one.num_shared for one in run.layers),
    "zero, copy or constant experts": _kinds,
    "several calls per layer": lambda run: any(one.step for one in run.layers),
    "choices per sequence": lambda run: any(one.granularity == "sequence" for one in run.layers),
    "experts of other layers": _borrowed,
    "a number of experts that varies": _varies,
}
"""What an architecture is known by in a run, by the words that methods use."""

BESIDE = {"the model": "", "a recurrent router": "no run says whether its router has a memory"}
"""What stands in no run, with the reason why a method is then not available; empty where the run is no hindrance."""

__all__ = ["BESIDE", "HAVE", "methods"]
