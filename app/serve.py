"""Starting the dashboard: ``serve`` becomes the server, ``start`` runs it beside the caller."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from moescope.errors import InputError, RunError

SCRIPT = Path(__file__).resolve().with_name("main.py")
FIRST_PORT = 8501
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(store: Path, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = True) -> int:
    """Serve the dashboard over ``store`` until interrupted. Where the system can, this process becomes the server.

    Raises:
        InputError: Streamlit is not installed, or the port is taken.
    """
    _require_streamlit()
    chosen = choose_port(host, port)
    command, environment = command_line(host=host, port=chosen, browser=browser), environment_for(store)
    print(f"dashboard: {url_of(host, chosen)}  (Ctrl-C ends it)", flush=True)
    _warn_exposed(host)
    if os.name == "posix":
        # One process with one id: Ctrl-C and exit codes are the server's own.
        os.execve(command[0], command, environment)
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except KeyboardInterrupt:
        return 130


def start(
    store: Path, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = True, timeout: float = 60.0
) -> tuple[subprocess.Popen[bytes], str]:
    """Start the dashboard beside this process; returns it and its address once it answers.

    Raises:
        InputError: Streamlit is not installed, or the port is taken.
        RunError: the server ended or did not answer in time; the message holds its last line.
    """
    _require_streamlit()
    chosen = choose_port(host, port)
    command = command_line(host=host, port=chosen, browser=browser)
    _warn_exposed(host)
    # A file, not a pipe: nobody reads a pipe while the caller works, and a full one would stop the server.
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            command, env=environment_for(store), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        url = url_of(host, chosen)
        _wait_until_healthy(server, url, timeout, said)
    return server, url


def command_line(*, host: str, port: int, browser: bool) -> list[str]:
    """The command that runs Streamlit on the dashboard. ``-P`` keeps files of the user's folder from shadowing ours."""
    flags: dict[str, object] = {
        "server.address": host,
        "server.port": port,
        "server.headless": not browser,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "browser.gatherUsageStats": False,
        "browser.serverAddress": "localhost" if host in _LOOPBACK else host,
        "client.toolbarMode": "minimal",
    }
    options = [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in flags.items()]
    if host in _LOOPBACK:
        # Against DNS rebinding: a page from elsewhere cannot read the dashboard under another name.
        options += [f"--server.allowedHosts={name}" for name in ("localhost", "127.0.0.1", "[::1]")]
    return [sys.executable, "-P", "-m", "streamlit", "run", str(SCRIPT), *options]


def environment_for(store: Path) -> dict[str, str]:
    """The environment of the server: the store, and where moescope itself is found."""
    environment = dict(os.environ)
    environment["MOESCOPE_STORE"] = str(store.expanduser().resolve())
    environment["PYTHONSAFEPATH"] = "1"
    root = str(SCRIPT.parents[1])
    if "site-packages" not in root and "dist-packages" not in root:
        # A checkout that is not installed: name it first, before folders of the user's own.
        environment["PYTHONPATH"] = os.pathsep.join(part for part in (root, environment.get("PYTHONPATH", "")) if part)
    return environment


def choose_port(host: str, port: int | None) -> int:
    """The given port, or the first free one from 8501.

    Raises:
        InputError: the given port, or every port up to 8600, is taken; or the address is not one of this machine.
    """
    candidates = [port] if port is not None else range(FIRST_PORT, FIRST_PORT + 100)
    for candidate in candidates:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, candidate))
                return candidate
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == 99:
                raise InputError(
                    f"--host {host} is not an address of this machine: leave it out, or give 0.0.0.0"
                ) from error
        except OverflowError as error:
            raise InputError(f"--port {candidate} is no port: give a number from 1 to 65535") from error
    wanted = f"port {port}" if port is not None else f"every port from {FIRST_PORT} to {FIRST_PORT + 99}"
    raise InputError(f"{wanted} on {host} is taken: give another one with --port")


def url_of(host: str, port: int) -> str:
    """The address to open in a browser on this machine."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "localhost") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


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


def _warn_exposed(host: str) -> None:
    if host not in _LOOPBACK:
        print(
            f"warning: listening on {host}: everyone who reaches this machine can read the runs, text included",
            file=sys.stderr,
        )
