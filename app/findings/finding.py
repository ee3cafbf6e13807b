"""What a finding is: a plain sentence about a run, and the numbers that it stands on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["problem", "attention", "plain", "unknown"]
"""What to make of it: broken; to be looked at; so it is; the run cannot say."""

Form = Literal["share", "number", "count"]
"""How a value is written: as a percentage of 0..1, with four significant digits, or as a whole number."""


@dataclass(frozen=True)
class Evidence:
    """One number behind a finding.

    Attributes:
        name: what it is.
        value: as a number, or as text where it is none.
        low, high: its interval; None without.
        control: the same by chance or of a control; None without.
        control_is: what the control is, in a few words.
        form: how numbers are written.
        source: the metric or table that it comes from.
        exhibit: the name of the exhibit that shows it; empty where none does.
    """

    name: str
    value: float | str | None
    low: float | None = None
    high: float | None = None
    control: float | None = None
    control_is: str = ""
    form: Form = "number"
    source: str = ""
    exhibit: str = ""

    @property
    def shown(self) -> str:
        """The value as text."""
        return self.value if isinstance(self.value, str) else written(self.value, self.form)

    @property
    def interval(self) -> str:
        """The interval as text; empty without one."""
        if self.low is None or self.high is None:
            return ""
        return f"{written(self.low, self.form)} to {written(self.high, self.form)}"

    @property
    def beside(self) -> str:
        """The control and what it is, as text; empty without one."""
        return "" if self.control is None else f"{written(self.control, self.form)} ({self.control_is})"

    @property
    def line(self) -> str:
        """All of it in one line."""
        interval = f" ({self.interval.replace(' to ', '–')})" if self.interval else ""
        control = "" if self.control is None else f"; {self.control_is}: {written(self.control, self.form)}"
        return f"{self.name}: {self.shown}{interval}{control}"


@dataclass(frozen=True)
class Finding:
    """One finding. Its texts are plain; names from data stand in them as they are.

    Attributes:
        subject: what it is about, in a word or two.
        answer: the answer in one short sentence, without a full stop; it begins with "No" where no is the answer.
        more: what else there is to say, in whole sentences.
        evidence: the numbers behind it, the most telling first.
        tone: what to make of it.
        page: title of the page that shows it; empty where none does.
        layer, expert: where to look there: a layer's label, a routed expert's number.
    """

    subject: str
    answer: str
    more: str = ""
    evidence: tuple[Evidence, ...] = ()
    tone: Tone = "plain"
    page: str = ""
    layer: str | None = None
    expert: int | None = None

    @property
    def sentence(self) -> str:
        """All that it says."""
        return f"{self.answer.rstrip('.')}. {self.more}".rstrip()


def beyond(value: float, low: float | None, control: float) -> bool:
    """Whether a value lies above its control, its interval counted."""
    return (value if low is None else low) > control


def written(value: float | None, form: Form) -> str:
    """A number as findings write it."""
    if value is None or value != value:
        return "–"
    if form == "share":
        return f"{value:.1%}"
    if form == "count":
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def listed(names: list[str], most: int = 6) -> str:
    """A few names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
