"""A report before it has a format: what stands in it, in order, for HTML and Markdown alike."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go
import polars as pl

import store
from app import exhibits
from app.exhibits import Absent, Entry, Exhibit, Frames
from app.findings.finding import Finding
from app.findings.findings import findings
from app.frames.methods import methods
from app.report.glossary import used_in
from app.report.provenance import provenance
from app.report.telling_layers import TellingLayer, telling_layers
from app.views import PAGES
from moescope import __version__
from moescope.errors import MoescopeError

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Shown:
    """One exhibit of the report.

    Attributes:
        anchor: unique in the report; letters, digits and dashes.
        name: of the exhibit.
        title: of the entry, with the layer where it is of one.
        layer: which one; None where it is of all.
        exhibit: with its light figure.
        dark: the same figure in dark colours; None where one theme suffices.
    """

    anchor: str
    name: str
    title: str
    layer: str | None
    exhibit: Exhibit
    dark: go.Figure | None = None

    def command(self, run: str, file: str) -> str:
        """The command line that writes it to a file."""
        told = "" if self.layer is None else f" --layer {shlex.quote(self.layer)}"
        return f"moescope figure {shlex.quote(run)} {self.name}{told} -o {shlex.quote(file)}"


@dataclass(frozen=True)
class Missing:
    """One exhibit that the run cannot fill: its title and page, why, and the command that would change it."""

    title: str
    page: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Section:
    """The exhibits of one page."""

    title: str
    anchor: str
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Further:
    """The exhibits of one page that no report draws: (name, title) each."""

    page: str
    exhibits: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Document:
    """The whole report; text in it is as in the data and has to be escaped where it is written."""

    run: str
    model: str
    badge: store.Badge
    live: str
    provenance: pl.DataFrame
    findings: tuple[Finding, ...]
    layers: tuple[TellingLayer, ...]
    sections: tuple[Section, ...]
    missing: tuple[Missing, ...]
    further: tuple[Further, ...]
    methods: pl.DataFrame
    glossary: tuple[tuple[str, str], ...]
    command: str
    tool: str = __version__


class Remembering:
    """Frames of one run, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Any] = {}

    def __call__(self, maker: Callable[..., Any], run: store.Run, /, **arguments: Any) -> Any:
        """What ``maker(run, **arguments)`` returns."""
        key = (maker, tuple((name, _hashable(value)) for name, value in sorted(arguments.items())))
        if key not in self._made:
            self._made[key] = maker(run, **arguments)
        return self._made[key]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def compose(
    run: store.Run, *, command: str, layers: int = 3, both: bool = True, frames: Frames | None = None,
    tell: Tell = lambda _: None,
) -> Document:  # fmt: skip
    """Everything that a report of a run shows.

    Args:
        run: finished, or still being collected: then what is published.
        command: how the report was made.
        layers: how many layers are shown expert by expert.
        both: draw dark figures beside the light ones.
        frames: where frames come from; by default each is made once and kept as long as this call.
        tell: told what is being done.
    """
    frames = frames or Remembering()
    tell("findings")
    found = tuple(findings(run, frames=frames))
    telling = tuple(telling_layers(run, layers, frames=frames))
    sections, missing = _sections(run, frames, [one.label for one in telling], both, tell)
    document = Document(
        run=run.name, model=run.info.model, badge=run.badge, live=_live(run), provenance=provenance(run),
        findings=found, layers=telling, sections=sections, missing=missing, further=_further(),
        methods=frames(methods, run), glossary=(), command=command,
    )  # fmt: skip
    return replace(document, glossary=tuple(used_in(words(document))))


FURTHER = (
    "Reports leave out what takes long, such as caches that are replayed, and what needs a choice, such as an expert, "
    "a text or a second run. Each is one command; without a name, it lists all of them with their choices:"
)
"""Why some exhibits are in no report."""


def further_command(run: str) -> str:
    """The command line that writes any exhibit to a file."""
    return f"moescope figure {shlex.quote(run)} NAME -o NAME.html"


def _further() -> tuple[Further, ...]:
    left = [entry for entry in exhibits.entries().values() if not entry.report]
    listed = [(page.title, tuple((one.name, one.title) for one in left if one.page == page.url)) for page in PAGES]
    return tuple(Further(title, found) for title, found in listed if found)


def words(document: Document) -> str:
    """All prose of a report, to look up which words it uses."""
    parts = [one.sentence for one in document.findings] + [
        one.name for two in document.findings for one in two.evidence
    ]
    for section in document.sections:
        parts += [text for one in section.shown for text in (one.title, one.exhibit.read, one.exhibit.rests_on)]
    return " ".join([*parts, *document.provenance["what"].to_list()])


def _sections(
    run: store.Run, frames: Frames, labels: list[str], both: bool, tell: Tell
) -> tuple[tuple[Section, ...], tuple[Missing, ...]]:
    entries = [entry for entry in exhibits.entries().values() if entry.report]
    wanted = [(entry, label) for entry in entries for label in (labels if entry.layers else [None])]
    shown: dict[str, list[Shown]] = {}
    missing: dict[tuple[str, str], Missing] = {}
    titles = {page.url: page.title for page in PAGES}
    for number, (entry, label) in enumerate(wanted, 1):
        tell(f"drawing {number} of {len(wanted)}: {entry.title}")
        page = titles.get(entry.page, entry.page)
        try:
            shown.setdefault(entry.page, []).append(_shown(run, entry, label, frames, both))
        except Absent as absent:
            missing.setdefault((entry.name, absent.reason), Missing(entry.title, page, absent.reason, absent.remedy))
        except MoescopeError as error:
            missing.setdefault((entry.name, str(error)), Missing(entry.title, page, str(error)))
    order = [*titles, *(url for url in shown if url not in titles)]
    sections = tuple(
        Section(titles.get(url, url), f"page-{url}", tuple(shown[url])) for url in order if shown.get(url)
    )  # fmt: skip
    return sections, tuple(missing.values())


def _shown(run: store.Run, entry: Entry, label: str | None, frames: Frames, both: bool) -> Shown:
    choices = {} if label is None else {"layer": label}
    made = exhibits.make(entry.name, run, frames=frames, theme="light", choices=choices)
    dark = exhibits.make(entry.name, run, frames=frames, theme="dark", choices=choices).figure if both else None
    anchor = entry.name if label is None else f"{entry.name}-layer-{label.replace('.', '-')}"
    title = entry.title if label is None else f"{entry.title}, layer {label}"
    return Shown(anchor, entry.name, title, label, made, dark)


def _live(run: store.Run) -> str:
    if not run.live:
        return ""
    done = run.progress
    of = f" of {done.token_budget:,}" if done and done.token_budget else ""
    return (
        f"This run is still being collected. The report shows what is published: {run.info.tokens:,}{of} tokens. "
        "What is computed from the whole trace comes when the collection ends."
    )
