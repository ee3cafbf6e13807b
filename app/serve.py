"""Starting the dashboard: ``serve`` becomes the server, ``start`` runs it beside the caller."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from app.address import READABLE, Address
from moescope.errors import InputError, RunError

SCRIPT = Path(__file__).resolve().with_name("asgi.py")
LOCAL = Address()
"""The first free port, for this machine only."""


def serve(store: Path | Sequence[Path], address: Address = LOCAL, *, browser: bool = True) -> int:
    """Serve the dashboard over ``store`` until interrupted. Where the system can, this process becomes the server.

    Args:
        store: one store or several; none at all takes those of the environment.

    Raises:
        InputError: Streamlit is not installed, or the port is taken.
    """
    _require_streamlit()
    address = address.with_port()
    command, environment = command_line(address), environment_for(store, address, browser=browser)
    print(f"dashboard: {address.url}  (Ctrl-C ends it)", flush=True)
    _warn_exposed(address)
    if os.name == "posix":
        # One process with one id: Ctrl-C and exit codes are the server's own.
        os.execve(command[0], command, environment)
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except KeyboardInterrupt:
        return 130


def start(
    store: Path | Sequence[Path], address: Address = LOCAL, *, browser: bool = True, timeout: float = 60.0
) -> tuple[subprocess.Popen[bytes], str]:
    """Start the dashboard beside this process; returns it and its address once it answers.

    Raises:
        InputError: Streamlit is not installed, or the port is taken.
        RunError: the server ended or did not answer in time; the message holds its last line.
    """
    _require_streamlit()
    address = address.with_port()
    command, environment = command_line(address), environment_for(store, address, browser=browser)
    _warn_exposed(address)
    # A file, not a pipe: nobody reads a pipe while the caller works, and a full one would stop the server.
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        _wait_until_healthy(server, address.url, timeout, said)
    return server, address.url


def command_line(address: Address) -> list[str]:
    """The command that runs Streamlit on the dashboard. ``-P`` keeps files of the user's folder from shadowing ours.

    What protects is said here: flags win over files of settings in the user's folders and over the environment.
    """
    flags: dict[str, object] = {
        "server.address": address.host,
        "server.port": address.port,
        "server.baseUrlPath": address.base_path,
        "server.headless": True,  # otherwise Streamlit asks for an e-mail address; see app/asgi.py
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "server.enableCORS": True,
        "server.enableXsrfProtection": True,
        "server.enableStaticServing": False,
        "server.enableAgentApi": False,
        "server.maxUploadSize": 1,  # no page takes a file
        "global.developmentMode": False,
        "browser.gatherUsageStats": False,
        "browser.serverAddress": "localhost" if address.is_local else address.host,
        "runner.magicEnabled": False,  # it writes every string that stands alone onto the page
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "logger.hideWelcomeMessage": True,
    }
    options = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in flags.items()]
    if address.is_local:
        # The guard checks all requests; this is Streamlit's own check, of websockets.
        options += [f"--server.allowedHosts={name}" for name in ("127.0.0.1", "::1", *address.hosts)]
    return [sys.executable, "-P", "-m", "streamlit", "run", str(SCRIPT), *options]


def environment_for(store: Path | Sequence[Path], address: Address = LOCAL, *, browser: bool = False) -> dict[str, str]:
    """The environment of the server: the store, its names, and where moescope itself is found."""
    environment = dict(os.environ)
    stores = [store] if isinstance(store, Path) else list(store)
    if stores:
        environment["MOESCOPE_STORE"] = os.pathsep.join(map(_shown, stores))
    environment["MOESCOPE_HOSTS"] = ",".join(address.hosts)
    environment["MOESCOPE_OPEN"] = address.url if browser else ""
    environment["PYTHONSAFEPATH"] = "1"
    environment.setdefault("MALLOC_ARENA_MAX", "2")  # of the C library: every rerun is a thread, see app/heap.py
    root = str(SCRIPT.parents[1])
    if "site-packages" not in root and "dist-packages" not in root:
        # A checkout that is not installed: name it first, before folders of the user's own.
        environment["PYTHONPATH"] = os.pathsep.join(part for part in (root, environment.get("PYTHONPATH", "")) if part)
    return environment


def _shown(store: Path) -> str:
    from store import shown

    return shown(store.expanduser().resolve())


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, timeout: float, said: IO[bytes]) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no message"
            raise RunError(f"the dashboard ended at once (exit code {server.returncode}): {last}")
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as answer:
                if answer.read().strip() == b"ok":
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    server.terminate()
    raise RunError(f"the dashboard did not answer at {url} within {timeout:.0f} s")


def _require_streamlit() -> None:
    from importlib.util import find_spec

    if find_spec("streamlit") is None or find_spec("plotly") is None:
        raise InputError("the dashboard needs Streamlit and Plotly: pip install 'moescope[app]'")


def _warn_exposed(address: Address) -> None:
    if not address.is_local:
        print(f"warning: listening on {address.host}: {READABLE}", file=sys.stderr)
