"""Exhibits of rules of routing that were tried on the model itself, from the documents beside a run."""

from __future__ import annotations

import shlex
from typing import Any

import polars as pl

import store
from app.exhibits.exhibit import Absent, Entry, Exhibit, Frames, fresh
from app.figures import sweep as figures
from app.figures.style import Theme, safe
from app.frames import sweep as frames_of
from app.frames.sweep import of_a_document
from moescope.errors import InputError

_UNTRAINED = "The router was not trained for these rules."
_MASKED = ("mask_top", "shared")
"""Rules of the test of redundancy, which has a figure of its own: they break a model, and save nothing."""

PAIRED = "95 % intervals of pairs of sequences."


@of_a_document
def costs(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sweep: str | None = None,
    domain: str | None = None,
) -> Exhibit:
    """Change of the loss against the experts' FLOPs; ``sweep``: name of the file, None = the newest."""
    frame = _rules(chosen(run, sweep), run, domain)
    return Exhibit(
        figure=figures.costs(frame, where=safe(domain or "all text"), theme=theme),
        frame=frame,
        read="Each mark is one value of a rule, measured on the model itself. Left is cheaper, down is better; at 0 a "
        f"rule costs nothing. {_UNTRAINED}",
        rests_on=f"{tokens_of(frame)} predicted tokens; {PAIRED}",
        alt="Change of the loss against the share of the experts' FLOPs, one curve per rule",
    )


@of_a_document
def domains(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", sweep: str | None = None) -> Exhibit:
    """Change of the loss, rules x domains."""
    document = chosen(run, sweep)
    frame = frames_of.rules(document).filter((pl.col("domain") != "all") & ~pl.col("rule").is_in(["none", *_MASKED]))
    if frame.is_empty():
        raise Absent("This sweep tried no rule.", remedy=command(run))
    return Exhibit(
        figure=figures.by_domain(frame, theme=theme),
        frame=frame,
        read="Orange: the rule costs most there; blue: the domain is predicted better than by the router's own choice. "
        "Hover for the interval; the colours end where a fifth of the cells lies beyond.",
        rests_on=f"{document['base']['tokens']:,} predicted tokens; {PAIRED}",
        alt="Map of rules and domains: change of the loss",
    )


@of_a_document
def active(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sweep: str | None = None,
    trial: str | None = None,
) -> Exhibit:
    """Experts per token over the layers; ``trial``: such as top_p=0.4, None = the one nearest to the router's own k."""
    document = chosen(run, sweep)
    name = trial_of(document, trial, varied=True)
    frame = frames_of.active(document).filter(pl.col("trial") == name)
    return Exhibit(
        figure=figures.active(frame, trial=name, theme=theme),
        frame=frame,
        read="How many experts tokens use where the rule decides. Layers or domains far above the others are those in "
        "which the router spreads its weight.",
        rests_on=f"{document['base']['tokens']:,} tokens.",
        alt="Curves over the layers: experts per token of each domain",
    )


@of_a_document
def difficulty(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sweep: str | None = None,
    trial: str | None = None,
) -> Exhibit:
    """Experts per token against the token's loss; ``trial`` as in the figure before."""
    document = chosen(run, sweep)
    name = trial_of(document, trial, varied=True)
    frame = frames_of.bins(document).filter(pl.col("trial") == name)
    return Exhibit(
        figure=figures.difficulty(frame, trial=name, theme=theme),
        frame=frame,
        read="If harder tokens used more experts, the curve would rise. The loss is that of the model as it is, of the "
        "token predicted at the same position.",
        rests_on=f"{document['base']['tokens']:,} tokens in bins of equally many; 95 % intervals over sequences.",
        alt="Curves: experts per token over the loss of the token, mean and each layer",
    )


@of_a_document
def correlations(
    run: store.Run,
    *,
    frames: Frames = fresh,
    theme: Theme = "light",
    sweep: str | None = None,
    trial: str | None = None,
) -> Exhibit:
    """Correlation of token loss and experts, by layer and domain."""
    document = chosen(run, sweep)
    name = trial_of(document, trial, varied=True)
    frame = frames_of.difficulty(document).filter(pl.col("trial") == name)
    return Exhibit(
        figure=figures.correlations(frame, trial=name, theme=theme),
        frame=frame,
        read="Right of 0, harder tokens use more experts. Over all text this mixes domains that differ in both; within "
        "a domain it does not.",
        rests_on=f"{document['base']['tokens']:,} tokens; 95 % intervals over sequences.",
        alt="Marks: correlation of loss and experts for all text, each domain and each layer",
    )


@of_a_document
def loss_over_k(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", sweep: str | None = None) -> Exhibit:
    """Loss over the number of experts per token: the slimmability curve."""
    document = chosen(run, sweep)
    frame = frames_of.rules(document).filter(pl.col("rule") == "top_k")
    if document["slimmability"] is None:
        raise Absent("This sweep tried fewer than two numbers of experts.", remedy=command(run, "--rule top_k=1,2,3,4"))
    return Exhibit(
        figure=figures.loss_over_k(frame, own=float(document["slimmability"]["own"]), theme=theme),
        frame=frame,
        read="A model is slimmable where the curve falls evenly up to its own number: then k can be chosen when it is "
        "served. A curve with its least point at the own number fits that number only.",
        rests_on=f"{document['base']['tokens']:,} predicted tokens; {PAIRED}",
        alt="Curves over the number of experts per token: change of the loss, all text and each domain",
    )


@of_a_document
def redundancy(run: store.Run, *, frames: Frames = fresh, theme: Theme = "light", sweep: str | None = None) -> Exhibit:
    """Loss without the best experts of each token, and without the shared ones."""
    document = chosen(run, sweep)
    frame = frames_of.rules(document).filter(pl.col("rule").is_in(_MASKED))
    if frame.is_empty():
        raise Absent("The test of redundancy was not run on this model.", remedy=command(run, "--redundancy"))
    return Exhibit(
        figure=figures.redundancy(frame, theme=theme),
        frame=frame,
        read="The more the loss rises without the experts that a token likes best, the less others can stand in for "
        "them: little redundancy. A flat curve means that experts are interchangeable.",
        rests_on=f"{document['base']['tokens']:,} predicted tokens; {PAIRED}",
        alt="Curves over the share of masked experts: change of the loss, all text and each domain",
    )


def chosen(run: store.Run, name: str | None) -> dict[str, Any]:
    """The document of that name beside a run; the newest for None.

    Raises:
        Absent: there is no sweep yet.
        InputError: none has that name.
        StoreError: it cannot be read.
    """
    found = {path.stem: path for path in store.list_evaluations(run.path, "sweep")}
    if not found:
        raise Absent(
            "No rule has been tried on the model itself yet. A trace says how many experts a rule would use; what it "
            "costs only the model can say. The command measures the loss on held-out text, rule by rule.",
            remedy=command(run),
        )
    if name is not None and name not in found:
        raise InputError(f"run {run.name!r} has no sweep {name!r}; it has {', '.join(found)}")
    return store.read_evaluation(found[name] if name is not None else next(iter(found.values())))


def command(run: store.Run, more: str = "") -> str:
    """What tries rules on the model of a run."""
    return f"moescope sweep MODEL --data PATH --against {shlex.quote(store.shown(run.path))} {more}".strip()


def trial_of(document: dict[str, Any], trial: str | None, *, varied: bool = False) -> str:
    """The trial that is shown: the one asked for, else the top-p value nearest to the router's own number of experts.

    Args:
        varied: only those under which tokens differ in their number of experts.

    Raises:
        Absent: there is none.
        InputError: none has that name.
    """
    frame = frames_of.rules(document).filter(pl.col("domain") == "all")
    if varied:
        names = [str(name) for name in frames_of.difficulty(document)["trial"].unique(maintain_order=True)]
    else:
        names = [name for name in frame["trial"].to_list() if name != "none"]
    if not names:
        raise Absent("This sweep tried no rule under which tokens differ in their number of experts.")
    if trial is not None:
        if trial not in names:
            raise InputError(f"this sweep has not tried {trial!r}; it has {', '.join(names)}")
        return trial
    own = frame.filter(pl.col("trial") == "none")["active"][0]
    known = frame.filter(pl.col("trial").is_in(names)).with_columns(
        away=(pl.col("active") - own).abs(), other=pl.col("rule") != "top_p"
    )
    return str(known.sort("other", "away")["trial"][0])


def _rules(document: dict[str, Any], run: store.Run, domain: str | None) -> pl.DataFrame:
    every = frames_of.rules(document).filter(~pl.col("rule").is_in(_MASKED))
    if every.filter(pl.col("rule") != "none").is_empty():
        raise Absent("This sweep tried no rule.", remedy=command(run))
    frame = every.filter(pl.col("domain") == (domain or "all"))
    if frame.is_empty():
        raise Absent(f"This sweep has no text of domain {domain}.")
    return frame


def tokens_of(frame: pl.DataFrame) -> str:
    """Tokens of all text, where the frame has it."""
    return f"{int(frame['tokens'].max() or 0):,}"  # type: ignore[arg-type]


PAGE = "what-if"

EXHIBITS = (
    Entry("sweep", costs, "What rules cost on the model itself", page=PAGE),
    Entry("sweep-domains", domains, "What rules cost in each domain", page=PAGE, report=False),
    Entry("sweep-k", loss_over_k, "Loss over the number of experts per token", page=PAGE, report=False),
    Entry("sweep-active", active, "Experts per token under a rule", page=PAGE, report=False),
    Entry("sweep-difficulty", difficulty, "Do harder tokens use more experts?", page=PAGE, report=False),
    Entry("sweep-correlations", correlations, "Token loss and experts, by layer and domain", page=PAGE, report=False),
    Entry("sweep-redundancy", redundancy, "Loss without the best experts", page=PAGE, report=False),
)
