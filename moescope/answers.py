"""Whether a Ray answers at an address, within seconds: ``ray.init`` alone waits for minutes where none does."""

from __future__ import annotations

import socket
import subprocess
import sys

from moescope.errors import InputError

PORT_SECONDS, RAY_SECONDS = 2.5, 6.5
"""In which a port, and then Ray behind it, must answer."""

_ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
"""What ``ray health-check`` does: ask the cluster's control service for the cluster's number."""


def require_answer(address: str) -> None:
    """Ask the port, and then Ray itself.

    Args:
        address: ``HOST:PORT`` of a cluster's head.

    Raises:
        InputError: it is no such address, or no Ray answers there.
    """
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address}: Ray's client mode is not used, since it passes everything through one process: run"
            " moescope on a node of the cluster, and give HOST:PORT of its head"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--ray is {address!r}: give 'local', or HOST:PORT of a Ray cluster's head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PORT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"no Ray answers at {address} ({reason}): is it running, and is this its port?") from None
    # In a process of its own: Ray's client has no deadline below 40 s, and cannot be stopped.
    command = [sys.executable, "-c", _ASK, address]
    try:
        asked = subprocess.run(command, timeout=RAY_SECONDS, capture_output=True, text=True, check=False)
        lines = asked.stderr.strip().splitlines()
        reason = "" if asked.returncode == 0 else (lines[-1][:300] if lines else f"exit code {asked.returncode}")
    except subprocess.TimeoutExpired:
        reason = f"no answer within {RAY_SECONDS:g} s"
    if reason:
        raise InputError(
            f"what listens at {address} does not answer as Ray does ({reason}): give HOST:PORT of the head"
        )
