"""One visitor of the dashboard without a browser: Streamlit's own protocol over a websocket.

It answers as the browser does: values of widgets go back with every rerun, the address holds those that are bound to
it, messages that it holds already come as references, and what looks at the store every few seconds is asked for in
time. Drawing is left out, so that many visitors fit on the machine of the server.
"""

from __future__ import annotations

import asyncio
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Origin, Subprotocol

_KEPT_RUNS = 2
"""Reruns for which a browser keeps messages that it has not seen again."""


@dataclass
class Visitor:
    """One session. Made by :func:`visitor`; its pump runs until :meth:`leave`.

    Attributes:
        errors: exceptions that the pages showed, and ends of the connection that nobody asked for.
        fragments: reruns of parts that the server asked for, such as its look at the store.
        options: per key of a select box or a row of buttons that is bound to the address, what can be chosen now.
        chosen: of these, what is chosen.
        words: the text of the last rerun, as it was sent.
    """

    socket: ClientConnection
    query: dict[str, str]
    errors: list[str] = field(default_factory=list)
    fragments: int = 0
    received: int = 0
    options: dict[str, list[str]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)
    page: str = ""
    words: list[str] = field(default_factory=list)
    _states: dict[str, WidgetState] = field(default_factory=dict)
    _widgets: dict[str, tuple[str, str]] = field(default_factory=dict)
    _held: dict[str, tuple[int, ForwardMsg]] = field(default_factory=dict)
    _timers: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _runs: int = 0
    _finished: asyncio.Event = field(default_factory=asyncio.Event)
    _pump: asyncio.Task[None] | None = None
    _leaving: bool = False

    async def open(self, page: str = "") -> float:
        """Ask for a page by its address; seconds until it is whole."""
        self.page = self.pages.get(page, "")
        return await self._rerun(page_name="" if self.page else page)

    async def choose(self, key: str, value: str) -> float:
        """Choose in the select box or the row of buttons of that key; seconds until the page is whole again."""
        kind, identity = self._widgets[key]
        state = WidgetState(id=identity)
        if kind == "selectbox":
            state.string_value = value
        else:
            state.string_array_value.data.append(value)
        self._states[identity] = state
        self.query[key] = value
        return await self._rerun()

    async def leave(self) -> None:
        """Close the connection."""
        self._leaving = True
        for timer in self._timers.values():
            timer.cancel()
        await self.socket.close()
        if self._pump is not None:
            await self._pump

    async def _rerun(self, page_name: str = "", seconds: float = 120.0) -> float:
        self._finished.clear()
        self.words, self.options, self.chosen = [], {}, {}
        began = time.perf_counter()
        await self._ask(page_name=page_name)
        try:
            await asyncio.wait_for(self._finished.wait(), seconds)
        except TimeoutError:
            self.errors.append(f"no answer within {seconds:g} s")
        return time.perf_counter() - began

    async def _ask(self, *, page_name: str = "", fragment: str = "") -> None:
        message = BackMsg()
        state = message.rerun_script
        state.query_string = urlencode(self.query)
        state.page_script_hash, state.page_name = self.page, page_name
        state.fragment_id, state.is_auto_rerun = fragment, bool(fragment)
        state.widget_states.widgets.extend(self._states.values())
        state.cached_message_hashes.extend(self._held)
        state.context_info.timezone, state.context_info.locale = "UTC", "en"
        await self.socket.send(message.SerializeToString())

    async def _listen(self) -> None:
        try:
            async for data in self.socket:
                if isinstance(data, bytes):
                    self.received += len(data)
                    self._take(ForwardMsg.FromString(data))
        except Exception as error:  # whatever ends the connection is what this looks for
            self.errors.append(f"{type(error).__name__}: {error}")
        if not self._leaving:
            self.errors.append(f"the connection ended: {self.socket.close_code}")
            self._finished.set()

    def _take(self, message: ForwardMsg) -> None:
        kind = message.WhichOneof("type")
        if kind == "ref_hash":
            if message.ref_hash not in self._held:
                self.errors.append("a reference to a message that was never sent")
                return
            message = self._held[message.ref_hash][1]
            kind = message.WhichOneof("type")
        if message.metadata.cacheable and message.hash:
            self._held[message.hash] = (self._runs, message)
        if kind == "navigation":
            self.pages = {page.url_pathname: page.page_script_hash for page in message.navigation.app_pages}
            self.page = message.navigation.page_script_hash
        elif kind == "delta" and message.delta.WhichOneof("type") == "new_element":
            self._see(message)
        elif kind == "auto_rerun":
            self._look_every(message.auto_rerun.interval, message.auto_rerun.fragment_id)
        elif kind == "page_not_found":
            self.errors.append(f"no page {message.page_not_found.page_name!r}")
        elif kind == "script_finished":
            self._end(message.script_finished)

    def _see(self, message: ForwardMsg) -> None:
        element = message.delta.new_element
        kind = element.WhichOneof("type")
        if kind == "exception":
            self.errors.append(f"{element.exception.type}: {element.exception.message}")
        elif kind in ("markdown", "alert", "text"):
            self.words.append(element.markdown.body or element.alert.body or element.text.body)
        elif kind in ("selectbox", "button_group") and getattr(element, kind).query_param_key:
            widget = getattr(element, kind)
            key = widget.query_param_key
            self._widgets[key] = (kind, widget.id)
            self.options[key] = list(widget.options) if kind == "selectbox" else [one.content for one in widget.options]
            if widget.set_value:  # the script has changed it, and the browser takes that over
                values = [widget.raw_value] if kind == "selectbox" else list(widget.raw_values)
                self._states[widget.id] = _state(kind, widget.id, values)
                self.query |= {key: values[0]} if values and values[0] else {}
            self.chosen[key] = self._chosen(kind, widget)

    def _chosen(self, kind: str, widget: Any) -> str:
        state = self._states.get(widget.id)
        if state is not None:
            return state.string_value or next(iter(state.string_array_value.data), "")
        if kind == "selectbox":
            return widget.options[widget.default] if widget.HasField("default") else ""
        return widget.options[widget.default[0]].content if widget.default else ""

    def _look_every(self, interval: float, fragment: str) -> None:
        async def look() -> None:
            while True:
                await asyncio.sleep(interval)
                await self._ask(fragment=fragment)

        if fragment in self._timers:
            self._timers[fragment].cancel()
        self._timers[fragment] = asyncio.create_task(look())

    def _end(self, status: int) -> None:
        if status == ForwardMsg.FINISHED_FRAGMENT_RUN_SUCCESSFULLY:
            self.fragments += 1
        elif status == ForwardMsg.FINISHED_WITH_COMPILE_ERROR:
            self.errors.append("the script could not be compiled")
        elif status == ForwardMsg.FINISHED_SUCCESSFULLY:
            self._runs += 1
            shown = {self._widgets[key][1] for key in self.options}
            self._states = {identity: state for identity, state in self._states.items() if identity in shown}
            self._held = {
                name: (run, held) for name, (run, held) in self._held.items() if self._runs - run <= _KEPT_RUNS
            }
            self._finished.set()


async def visitor(url: str, query: str = "", *, origin: str = "") -> Visitor:
    """A new visitor at an address of the dashboard, before its first page.

    Args:
        url: without page and query, such as ``http://127.0.0.1:8501``.
        query: of the address, such as ``run=sample``.
        origin: of the page that asks; empty = the dashboard's own.
    """
    parts = urlsplit(url)
    own = f"{parts.scheme}://{parts.netloc}"
    token = await asyncio.to_thread(_token, url)
    socket = await connect(
        f"ws://{parts.netloc}{parts.path}/_stcore/stream",
        origin=Origin(origin or own),
        subprotocols=[Subprotocol("streamlit"), Subprotocol(token)],
        additional_headers={"Cookie": f"_streamlit_xsrf={token}"},
        max_size=None,
        proxy=None,
    )
    found = Visitor(socket, dict(parse_qsl(query)))
    found._pump = asyncio.create_task(found._listen())
    return found


def _token(url: str) -> str:
    """The token against forged requests, which the server hands out as a cookie."""
    with urllib.request.urlopen(f"{url}/_stcore/health", timeout=30) as answer:
        cookie: str = answer.headers.get("Set-Cookie", "")
    return cookie.partition("=")[2].partition(";")[0]


def _state(kind: str, identity: str, values: list[str]) -> WidgetState:
    state = WidgetState(id=identity)
    if kind == "selectbox":
        state.string_value = values[0] if values else ""
    else:
        state.string_array_value.data.extend(values)
    return state
