"""The house rules that a machine can check: arrows between packages, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GRIDS = {"compressor.plan", "compressor.edits.quantize"}
"""What level errors tries must be what a plan asks for and what the backend does: one list of widths, one quantizer."""

ROUTING = "compressor.routing"
"""Rules that a sweep tries must be the rules that a loaded checkpoint follows: one list."""

ARROWS = {
    "moescope": set(),
    "store": set(),
    "compressor": set(),
    "profiler": {"compressor.families", "store", *GRIDS, ROUTING},
    "planner": {"compressor.plan", "profiler.metrics", "store"},
    "app": {"planner", "compressor", "profiler", "store", "sample_data"},
}
SQL_WORDS = ("select ", "insert into ", "create table ", "create view ", "attach ")


def _sources(package: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / package).rglob("*.py")))


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, also inside functions."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ARROWS)
def test_imports_go_one_way(package: str) -> None:
    allowed = ARROWS[package] | {package, "moescope"}
    ours = set(ARROWS) | {"sample_data", "tests", "benchmarks"}
    for path in _sources(package):
        for name in _imports(path):
            if name.split(".")[0] not in ours:
                continue
            reached = any(name == target or name.startswith(f"{target}.") for target in allowed)
            # "from compressor import families" names the package first; the name behind it is checked by itself.
            parent = any(target.startswith(f"{name}.") for target in allowed)
            assert reached or parent, f"{path.relative_to(ROOT)} imports {name}; {package} may import {sorted(allowed)}"


@pytest.mark.parametrize("package", ["moescope", "compressor", "profiler", "planner", "app"])
def test_sql_stays_in_the_store(package: str) -> None:
    for path in _sources(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.lower()
                found = [word for word in SQL_WORDS if text.startswith(word) and " from " in text]
                assert not found, f"{path.relative_to(ROOT)}:{node.lineno} holds SQL: {node.value[:60]!r}"


@pytest.mark.parametrize(
    "module",
    ["app", "app.cli", "app.main", "store", "planner", "planner.importance", "planner.merge", "profiler",
     "profiler.metrics", "profiler.corpus", "profiler.headline", "compressor"],
)  # fmt: skip
def test_starts_without_torch(module: str) -> None:
    # app.main is a Streamlit script: importing it outside the server is what a test runner does, without drawing.
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers'): sys.modules[name] = None\n"
        f"import importlib.util as util; assert util.find_spec({module!r})\n"
        + ("" if module == "app.main" else f"import {module}\n")
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_core_packages_start_without_streamlit() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'streamlit', 'plotly'): sys.modules[name] = None\n"
        "import store, planner, compressor, profiler, profiler.metrics, app.cli\n"
        "app.cli.parser().format_help()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exhibits_findings_and_the_report_start_without_streamlit_and_torch() -> None:
    packages = ("app.exhibits", "app.findings", "app.report", "app.figures", "app.frames")
    code = (
        "import importlib, pkgutil, sys\n"
        "for name in ('torch', 'transformers', 'streamlit'): sys.modules[name] = None\n"
        f"for package in {packages}:\n"
        "    for one in pkgutil.iter_modules(importlib.import_module(package).__path__, package + '.'):\n"
        "        importlib.import_module(one.name)\n"
        "import app.images, app.methods, store.console\n"
        "from app import exhibits; assert len(exhibits.entries()) > 40\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_figures_read_no_run() -> None:
    for path in _sources("app/figures"):
        found = [name for name in _imports(path) if name.split(".")[0] == "store"]
        assert not found, f"{path.relative_to(ROOT)} imports {found}: a figure is drawn from frames alone"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, app.cli; app.cli.parser(); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "streamlit", "plotly", "duckdb", "polars", "numpy", "numba", "scipy"}
    assert heavy.isdisjoint(done.stdout.split())


def test_first_pages_wait_for_no_compiler() -> None:
    # Numba takes a sixth of a second to import, which whoever opens the dashboard would wait for.
    code = "import sys, app.main, app.views.overview, app.views.routing; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0
