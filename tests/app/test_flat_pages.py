"""No page reads a trace whole: with small caps in place of the real ones, a visit leaves most sequences alone."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic
from visiting import visited

from app.exhibits import placement
from app.frames import expert_trace, kinds, stretches, token_misses, what_if
from app.views import PAGES
from planner.cache.setting import setting_of
from planner.simulate.what_if import fitting
from store.run import Run

SEQUENCES = 96
MOST = 0.5
"""Part of the sequences that a page may touch of any layer, where each of its parts may read a tenth."""

FEW = SEQUENCES * synthetic.TOKENS // 10
VIEWS = [Path(page.file).stem for page in PAGES]
SECTIONS = {"overview": ("Text",), "compress": ("Plan",)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("flat")
    synthetic.finished(directory, sequences=SEQUENCES)
    return directory


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caps in tokens that this run is longer than; whoever reads without a cap is not affected."""
    for module in (expert_trace, stretches):
        monkeypatch.setattr(module, "STRETCH_TOKENS", FEW // 4)
        monkeypatch.setattr(module, "MAX_STRETCHES", 4)
    monkeypatch.setattr(kinds, "STRETCHES", 4)
    monkeypatch.setattr(token_misses, "HISTORY", FEW)
    monkeypatch.setattr(what_if, "FIRST_LOOK", FEW * len(synthetic.LAYERS))
    advice = sys.modules["planner.simulate.what_if.advice"]  # the package has a function of that name
    monkeypatch.setattr(advice, "READ_TOKENS", FEW)
    monkeypatch.setattr(fitting, "FITTED_TOKENS", FEW)
    monkeypatch.setattr(placement, "TOKENS", FEW)
    monkeypatch.setitem(setting_of.__kwdefaults__, "steps", FEW * len(synthetic.LAYERS) // 2)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> dict[Any, set[int]]:
    """(what, layer) -> the sequences of which the trace, scores or text were read."""
    found: dict[Any, set[int]] = defaultdict(set)

    def watch(name: str, sequences: Callable[[Any], list[int]]) -> None:
        read = getattr(Run, name)

        def watched(self: Run, *given: Any, **asked: Any) -> Any:
            answer = read(self, *given, **asked)
            found[name, asked.get("layer")].update(sequences(answer))
            return answer

        monkeypatch.setattr(Run, name, watched)

    for name in ("layer_selections", "layer_scores", "selections", "router_scores", "token_ids"):
        watch(name, lambda answer: answer.sequences.tolist())
    table = Run.table

    def watched_table(self: Run, name: str, **asked: Any) -> Any:
        answer = table(self, name, **asked)
        packed = {"experts", "scores"} & set(answer.columns)
        if name in ("route_chunk", "score_chunk") and packed:
            found[name, asked.get("layer")].update(answer["sequence"].to_list())
        return answer

    monkeypatch.setattr(Run, "table", watched_table)
    return found


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.usefixtures("small")
def test_a_visit_reads_a_part(
    monkeypatch: pytest.MonkeyPatch, place: Path, touched: dict[Any, set[int]], view: str
) -> None:
    asked = {"layer": str(synthetic.LAYERS[1]), "expert": "3", "other-weights": "1", "find": "off"}
    for section in ("", *SECTIONS.get(view, ())):
        visited(monkeypatch, place, view, section, **asked)
    parts = {what: len(sequences) / SEQUENCES for what, sequences in touched.items()}
    assert max(parts.values(), default=0.0) <= MOST, parts


@pytest.mark.usefixtures("small")
def test_a_page_that_reads_everything_would_be_seen(place: Path, touched: dict[Any, set[int]]) -> None:
    with Run(place / "synthetic.duckdb", live_folder=False) as run:
        run.layer_selections(layer=synthetic.LAYERS[0])
    assert len(touched["layer_selections", synthetic.LAYERS[0]]) == SEQUENCES
