"""The runner's side of its conversation with the control plane, over one kept-alive HTTP connection each."""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tidemill.runner.folders import read_json

CONNECT_TIMEOUT_S: Final = 3.0
ANSWER_TIMEOUT_S: Final = 15.0
_BACKOFF_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_REFUSED_BACKOFF_S: Final = (*_BACKOFF_S, 5.0, 15.0)
"""Who is told no, again and again, may not be known there: as after an old backup was restored."""
_SPREAD: Final = 0.25
"""The part of a pause that is left to chance, so that many who lost it at once do not all come back at once."""


class Unreachable(Exception):
    """The control plane did not answer, or answered that it cannot now; the same request may succeed later."""


class Refused(Exception):
    """The control plane answered no; ``status`` and ``body`` say how."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status = status
        self.body = body
        super().__init__(f"{status}: {body.get('detail') or body.get('code') or body}")

    @property
    def fenced(self) -> bool:
        """Whether somebody else holds this launch's lease now."""
        return self.status == 409 and self.body.get("code") == "fenced"


class Closing(Exception):
    """The runner is about to end and waits for nothing more."""


class Way:
    """Which control plane all channels of a process ask. Thread-safe.

    Its address is read from the endpoint file each time, because it may come back at another port; ``api_url`` is used
    while there is no such file. Where several control planes stand in for each other the file has ``others`` too, the
    best first: when one of them fails a channel, the next one is asked, by all channels. ``ca`` has certificates, as
    PEM, of which one has to vouch for an address with https, unless the file has others; empty: those that this machine
    trusts.
    """

    def __init__(self, api_url: str, endpoint_file: Path | None, ca: str = "") -> None:
        self._ca = ca
        self._api_url = api_url
        self._endpoint_file = endpoint_file
        self._at = ""
        self._changing = threading.Lock()
        self._channels: weakref.WeakSet[Channel] = weakref.WeakSet()

    def url(self) -> str:
        """The one to ask now."""
        urls = self._urls()
        with self._changing:
            if self._at not in urls:
                self._at = urls[0]
            return self._at

    def ca(self) -> str:
        """The certificates that vouch for it."""
        return str(self._found().get("ca") or self._ca)

    @property
    def last(self) -> str:
        """The one that was to be asked last, without a look at the file."""
        return self._at

    def join(self, channel: Channel) -> None:
        """Tell this channel, too, when the one it waits for does not answer."""
        with self._changing:
            self._channels.add(channel)

    def leave(self, url: str, *, is_silent: bool) -> None:
        """Ask another than this, where there is one. One that is silent would be silent to the others that ask it."""
        urls = self._urls()
        with self._changing:
            if self._at != url or len(urls) == 1:
                return
            self._at = urls[(urls.index(url) + 1) % len(urls)] if url in urls else urls[0]
            waiting = [each for each in self._channels if each.asks == url] if is_silent else []
        for channel in waiting:
            channel.abort()

    def _urls(self) -> list[str]:
        """All there are, each once; at least one."""
        found = self._found()
        others = found.get("others")
        own = str(found.get("api_url") or self._api_url)
        return list(dict.fromkeys([*map(str, others if isinstance(others, list) else ()), own]))

    def _found(self) -> Mapping[str, Any]:
        return (read_json(self._endpoint_file) if self._endpoint_file else None) or {}


class Channel:
    """A connection to the control plane for the use of one thread, made again when it breaks.

    ``way`` is where to; left out: to ``api_url``, or where ``endpoint_file`` says. ``ca`` is as in ``Way``.
    """

    def __init__(
        self, *, api_url: str, endpoint_file: Path | None, token: str, prefix: str, ca: str = "", way: Way | None = None
    ) -> None:
        self._api_url = api_url
        self._endpoint_file = endpoint_file
        self._token = token
        self._prefix = prefix
        self._way = way or Way(api_url, endpoint_file, ca)
        self._connection: http.client.HTTPConnection | None = None
        self._failures = 0
        self._is_refused = False
        self.asks = ""
        """The address of whom it is connected to."""
        self._way.join(self)

    def copy(self) -> Channel:
        """Another connection to the same control plane, for another thread."""
        return Channel(
            api_url=self._api_url, endpoint_file=self._endpoint_file, token=self._token, prefix=self._prefix,
            way=self._way,
        )  # fmt: skip

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_s: float = ANSWER_TIMEOUT_S,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """The JSON of the answer. Raises: Unreachable, Refused."""
        response = self.open(method, path, body, timeout_s=timeout_s, content_type=content_type)
        try:
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Unreachable(str(error)) from error
        return _object(content)

    def open(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        *,
        timeout_s: float | None = ANSWER_TIMEOUT_S,
        content_type: str = "application/json",
        offset: int = 0,
    ) -> http.client.HTTPResponse:
        """An answer whose status is good and whose content is still to be read. Raises: Unreachable, Refused.

        ``offset``: only what comes after so many octets. That it is elsewhere (307) is a good answer too.
        """
        headers = {"Authorization": f"Bearer {self._token}"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        if body is not None:
            headers["Content-Type"] = content_type if isinstance(body, bytes) else "application/octet-stream"
        try:
            connection = self._connected()
            if connection.sock:
                connection.sock.settimeout(timeout_s)
            connection.request(method, self._prefix + path, body, headers, encode_chunked=not _sized(body))
            response = connection.getresponse()
            self._is_refused = False
            if response.status < 300 or response.status == 307:
                self._failures = 0
                return response
            problem = _object(response.read())
        except (OSError, http.client.HTTPException) as error:
            self.turn_away(is_silent=isinstance(error, TimeoutError))
            raise Unreachable(str(error) or type(error).__name__) from error
        if response.status >= 500 or response.status in (408, 425, 429):
            self.turn_away(is_silent=False)
            raise Unreachable(f"{response.status} {problem.get('detail', '')}")
        self._is_refused = True
        raise Refused(response.status, problem)

    def rest(self, until: threading.Event) -> bool:
        """Whether ``until`` was set while waiting a little, longer after each failure in a row."""
        delays_s = _REFUSED_BACKOFF_S if self._is_refused else _BACKOFF_S
        delay_s = delays_s[min(self._failures, len(delays_s) - 1)]
        self._failures += 1
        return until.wait(delay_s * (1 - _SPREAD * random.random()))  # noqa: S311 - nobody is kept from guessing it

    def close(self) -> None:
        """Drop the connection; the next call makes another."""
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    def turn_away(self, *, is_silent: bool = False) -> None:
        """Have the next call ask another control plane, where there is one; what ``Way.leave`` does."""
        self.close()
        self._way.leave(self.asks, is_silent=is_silent)

    def abort(self) -> None:
        """Wake the thread that waits for an answer on this connection; it gets Unreachable."""
        connection = self._connection
        if connection and connection.sock:
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.close()

    def _connected(self) -> http.client.HTTPConnection:
        """The connection to whoever is to be asked now."""
        if self._connection is not None:
            if self.asks == self._way.last:
                return self._connection
            self.close()
        self.asks = self._way.url()
        parts = urlsplit(self.asks)
        host = parts.hostname or "127.0.0.1"
        if parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, parts.port, timeout=CONNECT_TIMEOUT_S, context=trusting(self._way.ca())
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=CONNECT_TIMEOUT_S)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        return connection


def trusting(ca: str) -> ssl.SSLContext:
    """What checks who the other side is: by these certificates, as PEM, or by what this machine trusts.

    Raises: ValueError when they are none.
    """
    if not ca:
        return ssl.create_default_context()
    try:
        context = ssl.create_default_context(cadata=ca)
    except ssl.SSLError as error:
        raise ValueError(f"there is no certificate in it: {error}") from error
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a certificate that is given vouches for itself
    return context


def _sized(body: bytes | Iterable[bytes] | None) -> bool:
    return body is None or isinstance(body, bytes)


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content) if content else {}
    except ValueError:
        return {"detail": content[:200].decode(errors="replace")}
    return value if isinstance(value, dict) else {}
