"""What is checked of every request before anything else: whom it is addressed to, and where it comes from.

A page in somebody's browser can send requests to this machine's loopback address; it cannot choose their
``Host`` (DNS rebinding) nor hide their ``Origin``. Both are checked whatever the method and the path. What goes
wrong behind the door in an unforeseen way is answered here, without telling internals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidemill.api.problems import WrongHost, WrongOrigin, internal, problem
from tidemill.errors import TidemillError

log = logging.getLogger(__name__)
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


class Door:
    """The outermost layer: pure ASGI, no work for requests that are fine."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], others: Callable[[], Iterable[str]] = lambda: ()) -> None:
        names = {name.lower() for name in (*_LOOPBACK, *hosts) if name}
        self._app = app
        self._hosts = frozenset(names)
        self._others = others
        self._fine: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await problem(refusal)(scope, receive, send)
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if started:
                log.exception("an answer broke off")
                raise
            await internal(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> TidemillError | None:
        host = origin = b""
        hosts = 0
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
                hosts += 1
            elif name == b"origin":
                origin = value
        if hosts != 1 or not self._is_ours(host):
            return WrongHost(
                "This is not the host that the request is addressed to.",
                field="Host",
                value=host.decode("latin-1")[:200],
                mend="Use this machine's own name, or add the name to hosts in config.yaml.",
            )
        if origin and not self._is_own_page(origin, host):
            return WrongOrigin(
                "Pages of other origins may not send requests here.",
                field="Origin",
                value=origin.decode("latin-1")[:200],
            )
        return None

    def _is_ours(self, host: bytes) -> bool:
        if host in self._fine:
            return True
        text = host.decode("latin-1").lower()
        name, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        name = name if colon else text
        if colon and not (port.isascii() and port.isdigit() and len(port) <= 5):
            return False
        if name not in self._hosts and name not in self._others():
            return False
        if len(self._fine) < 100:
            self._fine.add(host)
        return True

    def _is_own_page(self, origin: bytes, host: bytes) -> bool:
        scheme, separator, place = origin.partition(b"://")
        return bool(separator) and scheme in (b"http", b"https") and place.lower() == host.lower()
