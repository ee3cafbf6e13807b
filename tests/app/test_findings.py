"""What the Overview says of a run in words, against the figures behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import synthetic
from visiting import visited

import store
from app.frames.findings import findings
from app.views import PAGES


def test_findings_say_what_the_run_holds(run: store.Run) -> None:
    frame = findings(run)
    said = dict(frame.select("finding", "evidence").rows())
    assert said["1 super expert, as (layer, expert): (2, 5)"].startswith("the largest output is 820")
    row = frame.filter(pl.col("page") == "Super experts").row(0, named=True)
    assert (row["layer"], row["expert"]) == ("2", synthetic.SUPER_EXPERT[1])
    (load,) = (text for text in said if text.startswith("The load is"))
    effective = []
    worst: tuple[float, str, int] = (0.0, "", 0)
    for layer in synthetic.LAYERS:
        ids = run.selections(layers=[layer]).ids
        counts = np.bincount(ids[ids >= 0], minlength=synthetic.EXPERTS)
        share = counts[counts > 0] / counts.sum()
        effective.append(np.exp(-(share * np.log(share)).sum()) / synthetic.EXPERTS)
        worst = max(worst, (counts.max() / counts.mean(), str(layer), int(counts.argmax())))
    assert f"{np.median(effective):.0%} of its experts" in load
    row = frame.filter(pl.col("finding") == load).row(0, named=True)
    assert (row["layer"], row["expert"]) == worst[1:]
    assert "SRP over 16 tokens is 53.0%" in said["Neighbouring tokens share experts"]
    assert set(frame["page"]) <= {page.title for page in PAGES}


def test_findings_of_little_are_few(tmp_path: Path) -> None:
    with store.open_run(synthetic.finished(tmp_path, metrics=False, activations=False)) as run:
        pages = findings(run)["page"].to_list()
    assert "Super experts" not in pages and "Routing" in pages
    synthetic.live(tmp_path, shards=0)
    with store.open_run(tmp_path / "growing.live") as run:
        assert findings(run).is_empty()


def test_a_finding_leads_to_its_expert(monkeypatch: pytest.MonkeyPatch, finished_path: Path) -> None:
    def queries(**focus: str) -> set[str]:
        app = visited(monkeypatch, finished_path.parent, **focus)
        return {link.proto.query_string for link in app.get("page_link") if link.proto.label == "Super experts"}

    assert queries() == {"layer=2&expert=5", ""}  # of the finding, and of what to look at next
    assert queries(layer="2", expert="5") == {""}  # what is in the address already is not given twice
