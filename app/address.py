"""Where the dashboard listens, and under which names it answers."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moescope.errors import InputError

FIRST_PORT = 8501
READABLE = (
    "everyone who reaches that address can read the runs, texts included, and start jobs that read and write your files"
)
_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_TAKEN = ("_stcore", "media", "component", "static", "app")
"""First parts of Streamlit's own paths."""


@dataclass(frozen=True)
class Address:
    """Where the dashboard listens. Made of what a user typed by :func:`checked`.

    Attributes:
        host: address or name of this machine to listen on.
        port: None = the first free one from 8501, see :meth:`with_port`.
        base_path: first part of all its paths, without slashes around; empty for none.
        names: names that it also answers under, such as that of a reverse proxy; ``*.example.org`` for all below one.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    base_path: str = ""
    names: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that a Host header may hold, beside IP addresses: a page from elsewhere has none of them."""
        own = () if self.is_local else (socket.gethostname(), *((self.host,) if _NAME.fullmatch(self.host) else ()))
        return tuple(dict.fromkeys(("localhost", *own, *self.names)))

    @property
    def url(self) -> str:
        """The address to open in a browser on this machine."""
        shown = "127.0.0.1" if self.host in ("0.0.0.0", "::", "localhost") else self.host
        start = f"http://[{shown}]:{self.port}" if ":" in shown else f"http://{shown}:{self.port}"
        return f"{start}/{self.base_path}" if self.base_path else start

    def with_port(self) -> Address:
        """The same with a port: the given one, or the first free one from 8501.

        Raises:
            InputError: the given port, or every port up to 8600, is taken; or the host is not one of this machine.
        """
        return replace(self, port=choose_port(self.host, self.port))


def checked(
    host: str, *, port: int | None = None, expose: bool = False, base_path: str = "", names: Sequence[str] = ()
) -> Address:
    """An address of what a user typed.

    Args:
        expose: listen where others reach it.

    Raises:
        InputError: others would reach it and ``expose`` is not given; or a name or path that cannot be.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"--allowed-hosts {name!r} is no name of a host: give names without port or path, as moe.example.org"
            )
    path = base_path.strip("/")
    if path and (not _PATH.fullmatch(path) or path.split("/")[0] in _TAKEN):
        raise InputError(f"--base-path {base_path!r} cannot be: use letters, digits, '.', '_', '-', such as /moescope")
    address = Address(host, port, path, tuple(names))
    if not address.is_local and not expose:
        raise InputError(f"--host {host} needs --expose: {READABLE}")
    return address


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
        except (ValueError, UnicodeError) as error:
            raise InputError(f"--host {host!r} is no address") from error
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == 99:
                raise InputError(
                    f"--host {host} is not an address of this machine: leave it out, or give 0.0.0.0"
                ) from error
        except OverflowError as error:
            raise InputError(f"--port {candidate} is no port: give a number from 1 to 65535") from error
    wanted = f"port {port}" if port is not None else f"every port from {FIRST_PORT} to {FIRST_PORT + 99}"
    raise InputError(f"{wanted} on {host} is taken: give another one with --port")
