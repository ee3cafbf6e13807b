"""What stands before Streamlit: who may ask, and what a browser may do with the answer.

Streamlit checks names only where a websocket opens, and there takes every port of this machine for its own; of an
origin that it does not know, it asks a server on the internet for the address of this machine. Here all requests are
checked first.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

_POLICY = {
    "default-src": "'self'",
    # Components bring their scripts and styles along; the charts compile their shaders and templates.
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "frame-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
    "frame-ancestors": "'self'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{part} {sources}" for part, sources in _POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer: text from a run loads nothing from elsewhere, even where it should become markup."""


class Guard:
    """ASGI middleware that refuses foreign names and origins, and adds :data:`HEADERS`.

    A Host header must be an IP address, which no foreign page can be bound to, or one of ``hosts``. A request that has
    an Origin must come from the very host and port that it asks.

    Args:
        app: what is guarded.
        hosts: names; ``*.example.org`` for all below one.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = frozenset(name.lower() for name in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal: 403, or the websocket closed."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(Headers(scope=scope))
        if refusal is None:
            await self.app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await WebSocketClose(code=1008, reason=refusal)(scope, receive, send)
        else:
            await PlainTextResponse(f"{refusal}\n", status_code=403, headers=HEADERS)(scope, receive, send)

    def refusal(self, headers: Headers) -> str | None:
        """Why a request with these headers is refused; None where it is not."""
        named = headers.getlist("host")
        if len(named) != 1 or not self._is_known(named[0]):
            return "this name is not served: start the dashboard with --allowed-hosts NAME"
        for origin in headers.getlist("origin"):
            parts = _split(origin)
            if parts is None or parts.scheme not in ("http", "https") or parts.netloc.lower() != named[0].lower():
                return "another page asks: a proxy must hand on the Host header as the browser sends it"
        return None

    def _is_known(self, host: str) -> bool:
        parts = _split(f"//{host}")
        name = parts.hostname if parts is not None and parts.netloc == host and "@" not in host else None
        if name is None:
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            name = name.rstrip(".")
            return name in self.hosts or any(known[:2] == "*." and name.endswith(known[1:]) for known in self.hosts)


def _split(address: str) -> Any:
    try:
        parts = urlsplit(address)
        _ = parts.port  # a port that is no number is noticed only here
        return parts
    except ValueError:
        return None


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sent
