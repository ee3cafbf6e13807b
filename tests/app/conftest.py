"""Synthetic runs for the tests of frames, figures and pages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import synthetic

import store


@pytest.fixture(scope="session", autouse=True)
def scanned_once() -> Iterator[None]:
    """Streamlit's runner reads the metadata of every installed package for each app that it opens: once will do."""
    from streamlit.components.v2 import manifest_scanner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_scanner, "scan_component_manifests", cache(manifest_scanner.scan_component_manifests))
        yield


@pytest.fixture(scope="session")
def finished_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with every table and every headline metric. Do not change it."""
    return synthetic.finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def run(finished_path: Path) -> Iterator[store.Run]:
    """The finished run, opened."""
    with store.open_run(finished_path) as opened:
        yield opened
