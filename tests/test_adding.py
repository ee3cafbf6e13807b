"""docs/adding.md is true: a metric, an importer and a page are each added in one file and one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import store
from profiler.document import importers_page, metrics_page
from profiler.metrics.registry import METRICS, Metric

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n([\s\S]*?)(?=^## |\Z)", GUIDE, re.MULTILINE))
EXPERTS, TOP_K, LAYERS = 6, 2, (1, 3)


def follow(tree: Path, section: str) -> None:
    """Do what a section of the guide says: copy its file, and add its line."""
    ((source, target),) = re.findall(r"^cp (\S+) (\S+)$", section, re.MULTILINE)
    assert not (tree / target).exists()
    shutil.copy(tree / source, tree / target)
    ((name, before, added),) = re.findall(r"```diff\n--- (\S+)\n (.+)\n\+(.+)\n```", section)
    text = (tree / name).read_text(encoding="utf-8")
    assert text.count(f"{before}\n") == 1, f"{name} has no line {before!r}"
    (tree / name).write_text(text.replace(f"{before}\n", f"{before}\n{added}\n"), encoding="utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with all three additions."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("app", "profiler", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("screenshots"))
    for name in ("moescope", "store", "planner", "compressor", "sample_data"):
        (root / name).symlink_to(ROOT / name)
    for section in ("A metric", "An importer", "A page"):
        follow(root, SECTIONS[section])
    return root


def python(tree: Path, code: str) -> str:
    """What the code prints with the packages of the copy; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "MOESCOPE_STORE": str(tree / "runs")}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


@pytest.fixture(scope="module")
def trace(tree: Path) -> Path:
    """A route trace of 3 turns, as the engine writes it."""
    generator = np.random.default_rng(0)
    lines = ["# route_trace v1", f"# model=/sd card/toy-moe.gguf arch=toy n_layer=4 n_expert={EXPERTS} n_expert_used=2"]
    lines += [f"# layer={layer} expert_bytes=10 dense_bytes=5" for layer in range(4)]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes,dropped")
    for turn, (prompt, total) in enumerate([(20, 40), (5, 60), (1, 30)]):
        for step in range(total):
            for layer in LAYERS:
                if layer == LAYERS[-1] and step < prompt - 1:
                    continue  # of the prompt, the last layer routes the last token only
                for slot, expert in enumerate(generator.permutation(EXPERTS)[:TOP_K]):
                    dropped = int(slot == 1 and generator.random() < 0.1)
                    weight = (0.7, 0.3)[slot]
                    lines.append(f"{turn},{int(step >= prompt)},{step},{layer},{slot},{expert},{weight},0,0,{dropped}")
    path = tree / "trace.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def imported(tree: Path, trace: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The trace, imported by the copy, and the metrics that are shown of it."""
    code = f"""
from app.cli import main
assert main(["import", "route-trace", {str(trace)!r}, "--store", "runs", "--name", "phone", "--json"]) == 0
assert main(["show", "phone", "metrics", "--store", "runs", "--json"]) == 0
"""
    return tree / "runs" / "phone.duckdb", json.loads(python(tree, code).splitlines()[-1])


def test_an_importer_takes_its_format(trace: Path, imported: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = [line.split(",") for line in trace.read_text(encoding="utf-8").splitlines() if not line.startswith("#")][1:]
    with store.open_run(imported[0]) as run:
        assert (run.info.model, run.info.tokens, run.info.sequences) == ("toy-moe", 130, 3)
        assert run.info.origin == "import route-trace"
        assert set(run.omissions) == {"text", "logits", "outputs"}
        ids = run.selections().ids
        found = {}
        for axis, sequence, position in zip(*np.nonzero((ids >= 0).any(axis=3)), strict=True):
            experts = ids[axis, sequence, position]
            found[sequence, position, run.layers[axis].layer] = experts[experts >= 0].tolist()
        wanted: dict[tuple[int, int, int], list[int]] = {}
        for turn, _, step, layer, _, expert, *_, dropped in rows:
            wanted.setdefault((int(turn), int(step), int(layer)), [])
            if dropped == "0":
                wanted[int(turn), int(step), int(layer)].append(int(expert))
        assert found == {place: experts for place, experts in wanted.items() if experts}
        checks = dict(run.table("check").select("name", "status").iter_rows())
        assert checks["layers complete"] == "warning"  # what the last layer did not route
        phases = run.table("router_load").filter(pl.col("layer") == 1).group_by("phase").agg(pl.col("tokens").sum())
        assert dict(phases.iter_rows()) == {"prompt": 26, "decode": 104}


def test_an_importer_is_among_those_that_hostile_files_are_tried_on(tree: Path) -> None:
    target = tree / "tests" / "profiler" / "importers"
    shutil.copytree(ROOT / "tests" / "profiler" / "importers", target)
    code = f"""
import pytest
names = ["-q", "-p", "no:cacheprovider", "-k", "route-trace", {str(target / "test_hostile.py")!r}]
assert pytest.main(names) == 0
"""
    assert re.search(r"^[1-9]\d* passed", python(tree, code), re.MULTILINE)


def test_a_metric_is_computed_and_shown(imported: tuple[Path, list[dict[str, Any]]]) -> None:
    mine = {(row["layer"], row["control"]): row for row in imported[1] if row["metric"] == "free_tokens"}
    assert set(mine) == {(layer, control) for layer in LAYERS for control in ("observed", "shuffled", "uniform")}
    with store.open_run(imported[0]) as run:
        ids = run.selections().ids
        lengths = run.table("sequence").sort("sequence")["tokens"].to_list()
        for axis, layer in enumerate(run.layers):
            free = total = 0
            for sequence, length in enumerate(lengths):
                sets = [set(ids[axis, sequence, position].tolist()) - {-1} for position in range(length)]
                free += sum(later <= earlier for earlier, later in zip(sets, sets[1:], strict=False))
                total += length - 1
            row = mine[layer.layer, "observed"]
            assert row["value"] == pytest.approx(free / total, abs=1e-12)
            assert row["tokens"] == total
            assert row["low"] <= row["value"] <= row["high"]


def test_a_page_opens_and_its_exhibit_is_listed(tree: Path, imported: tuple[Path, list[dict[str, Any]]]) -> None:
    code = """
import json
from streamlit.testing.v1 import AppTest
from app import exhibits, main
import store
assert exhibits.entry("layer-ranking").page == "layer-ranking"
app = AppTest.from_file(main.__file__, default_timeout=100).run()
app.switch_page("views/layer_ranking.py").run()
app.selectbox(key="measure").set_value("max_violation").run()
assert not app.exception, app.exception[0].message
figure = json.loads(app.get("plotly_chart")[0].proto.spec)
with store.open_run("runs/phone.duckdb") as run:
    made = exhibits.make("layer-ranking", run, choices={"by": "max_violation"})
print(json.dumps({
    "title": app.title[0].value, "rows": app.dataframe[0].value["rank"].tolist(), "layers": figure["data"][0]["y"],
    "axis": figure["layout"]["xaxis"]["title"]["text"], "values": made.frame["max_violation"].to_list(),
}))
"""
    drawn = json.loads(python(tree, code).splitlines()[-1])
    assert drawn["title"] == "Layer ranking"
    assert drawn["rows"] == [1, 2]
    assert sorted(drawn["layers"]) == ["1", "3"]
    assert "MaxVio" in drawn["axis"]
    assert drawn["values"] == sorted(drawn["values"], reverse=True)


def test_all_are_documented(tree: Path) -> None:
    target = tree / "tests" / "profiler" / "metrics"
    target.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "profiler" / "metrics" / "test_registry.py", target)
    code = f"""
import pytest
from app.cli import main
from profiler import document
document.main()
assert pytest.main(["-q", "-p", "no:cacheprovider", {str(target)!r}]) == 0
assert main(["import", "--list", "--json"]) == 0
"""
    listed = json.loads(python(tree, code).splitlines()[-1])
    assert "route-trace" in [row["format"] for row in listed]
    metrics = (tree / "docs" / "metrics.md").read_text(encoding="utf-8")
    importers = (tree / "docs" / "importers.md").read_text(encoding="utf-8")
    assert metrics.index("### Mean overlap") < metrics.index("### Free tokens") < metrics.index("## Flow")
    assert importers.index("| `megatron` |") < importers.index("| `route-trace` | BigMoeOnEdge |")
    assert importers.index("## `megatron`") < importers.index("## `route-trace`\n\nBigMoeOnEdge")


def test_pages_of_documentation_are_up_to_date() -> None:
    own = Metric("mine", "My metric", "share", "0..1", "more of it", "ours", section="What it is.\n- Formula: a / b\n")
    for name, made in (("metrics", metrics_page), ("importers", importers_page)):
        page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert page == made(page), "run: python -m profiler.document"
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    written = metrics_page(page, (*METRICS, own))
    assert written == metrics_page(written, (*METRICS, own))
    changed = metrics_page(written, (*METRICS, replace(own, section="Another text.\n- Formula: a / b\n")))
    assert changed == written.replace("What it is.", "Another text.")
    assert written.startswith(page)
