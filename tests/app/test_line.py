"""The line that is printed over itself, and what comes after it."""

import re

import pytest

from app import line
from app.cli import main
from app.telling import Telling


def test_an_error_stands_below_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    line.over("collecting 10%")
    line.over("collecting 20%")
    assert main(["show", "nowhere"]) == 2
    assert main(["show", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"\rcollecting 10% +\rcollecting 20% +\nmoescope: .*\nmoescope: .*\n", said)


def test_what_begins_anew_is_timed_anew(capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 0.0, 10.0, 20.0, 100.0, 102.0, 104.0])
    with Telling(clock=now.__next__) as tell:
        for number in (1, 2, 3, 1, 2, 3):
            tell(f"part {number} of 5")
    times = [found or None for found in re.findall(r"\[[^,\]]*(?:, (\d+ s) left of this)?\]", capsys.readouterr().err)]
    assert times == [None, "40 s", "30 s", None, "8 s", "6 s"]


def test_a_line_that_stays_or_was_taken_away_needs_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    line.over("2 workers", stays=True)
    line.end()
    line.over("fetching")
    line.clear()
    line.end()
    line.clear()
    assert re.fullmatch(r"\r2 workers +\n\rfetching +\r +\r", capsys.readouterr().err)
