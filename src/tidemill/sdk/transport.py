"""HTTP to a control plane, or to one of several of a cloud: kept connections, bounded retries, errors as exceptions.

Every call may be repeated: reads are harmless, writes carry an ``Idempotency-Key`` made once per call. So
a refused or broken connection and an answer of 503 are tried again, with growing, jittered pauses, until
``retry_for_s`` is over; where there are several addresses, each time another one is asked. Only the standard library
is used, for start-up time (see ``tidemill.sdk``).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ssl import SSLCertVerificationError, SSLContext
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit

from tidemill import __version__
from tidemill.errors import (
    Conflict,
    ErrorKind,
    Forbidden,
    InvalidRequest,
    NotFound,
    StorageFull,
    TidemillError,
    TooLarge,
    Unauthorized,
    Unavailable,
)

CONNECT_TIMEOUT_S = 5.0
TURN_AWAY_S = 2.0
"""So long a connection may take where there is another address to ask."""
READ_TIMEOUT_S = 60.0
_BY_STATUS: Mapping[int, type[TidemillError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
    507: StorageFull,
}


class Body(Protocol):
    """What a body is read from."""

    def read(self, size: int = ..., /) -> bytes: ...

    def close(self) -> None: ...


Content = bytes | Callable[[], Body]
"""A body: octets, or what opens them anew for every try."""
OnRetry = Callable[[TidemillError], None]


@dataclass(frozen=True)
class Answer:
    """A whole answer with a status below 400."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """The body's JSON value; None for an empty body. Raises: TidemillError when it is not JSON."""
        if not self.content:
            return None
        try:
            return json.loads(self.content)
        except ValueError as error:
            raise TidemillError(
                f"the answer is not JSON: {self.content[:80]!r}", mend="Is this address a Tidemill control plane?"
            ) from error


@dataclass(frozen=True, slots=True)
class Address:
    """Where a control plane answers; ``port`` is None for the scheme's own, ``prefix`` begins every path."""

    secure: bool
    host: str
    port: int | None
    prefix: str
    url: str

    @classmethod
    def read(cls, url: str) -> Address:
        """The address that ``url`` is; http unless it says otherwise. Raises: InvalidRequest."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InvalidRequest(
                "is not an address", field="url", value=url, mend="Write for example http://127.0.0.1:7070."
            )
        prefix = parts.path.rstrip("/")
        return cls(parts.scheme == "https", parts.hostname, port, prefix, f"{parts.scheme}://{parts.netloc}{prefix}")


class Transport:
    """Calls to one cloud with one token; safe to use from several threads.

    ``others`` are further addresses of that cloud. Whichever answered last is asked first. ``ca`` has certificates, as
    PEM, that vouch for those with https; empty: those that this machine trusts.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        others: Iterable[str] = (),
        ca: str = "",
        retry_for_s: float = 5.0,
        on_retry: OnRetry | None = None,
    ) -> None:
        """Raises: InvalidRequest when one of them is not an http(s) address."""
        self._addresses = tuple(Address.read(one) for one in (url, *others))
        self._context = _trusting(ca) if any(one.secure for one in self._addresses) else None
        self._asked = 0
        """Which of the addresses is asked, modulo their number."""
        self.retry_for_s = retry_for_s
        self.on_retry = on_retry
        self._headers = {"Authorization": f"Bearer {token}", "User-Agent": f"tidemill/{__version__}"}
        self._idle: list[tuple[HTTPConnection, Address]] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address that is asked next."""
        return self._address().url

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = READ_TIMEOUT_S,
        retry_for_s: float | None = None,
    ) -> Answer:
        """The whole answer, after as many tries as the time for retries allows.

        Raises: the TidemillError that the answer stands for; Unavailable when there was none.
        """
        sent = dict(self._headers, Accept="application/json", **(headers or {}))
        if body is not None:
            content = json.dumps(body, separators=(",", ":")).encode()
            sent["Content-Type"] = "application/json"
        if method not in ("GET", "HEAD"):
            sent.setdefault("Idempotency-Key", os.urandom(16).hex())
        target = _target(path, query)
        for attempt in Attempts(self.retry_for_s if retry_for_s is None else retry_for_s, self.on_retry):
            with attempt:
                return self._exchange(method, target, content, sent, timeout_s)
        raise AssertionError("unreachable: the last attempt raises")

    def get(self, path: str, **query: Any) -> Any:
        """The JSON answer to a GET."""
        return self.call("GET", path, query=query).json()

    def post(self, path: str, body: Any = None, **query: Any) -> Any:
        """The JSON answer to a POST."""
        return self.call("POST", path, body={} if body is None else body, query=query).json()

    def open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> Stream:
        """An answer to read as it comes, on a connection of its own; one try.

        Raises: as ``call``.
        """
        connection, address = self._connect(timeout_s)
        try:
            asked = address.prefix + _target(path, query)
            connection.request(method, asked, headers={**self._headers, **(headers or {})})
            response = connection.getresponse()
            if response.status >= 400:
                raise error_from(response.status, response.read(1 << 20))
        except (OSError, HTTPException) as error:
            connection.close()
            self._turn_away(address)
            raise _unreachable(address, error) from error
        except BaseException:
            connection.close()
            raise
        return Stream(connection, response)

    def upload(self, path: str, *, timeout_s: float = READ_TIMEOUT_S) -> Upload:
        """A POST whose body is sent piece by piece as it comes to be."""
        connection, address = self._connect(timeout_s)
        try:
            connection.putrequest("POST", address.prefix + path)
            for name, value in self._headers.items():
                connection.putheader(name, value)
            connection.putheader("Content-Type", "application/octet-stream")
            connection.putheader("Transfer-Encoding", "chunked")
            connection.putheader("Idempotency-Key", os.urandom(16).hex())
            connection.endheaders()
        except (OSError, HTTPException) as error:
            connection.close()
            self._turn_away(address)
            raise _unreachable(address, error) from error
        return Upload(connection)

    def close(self) -> None:
        """Let go of kept connections; harmless twice."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def _exchange(
        self, method: str, target: str, content: Content | None, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        if kept is not None:
            try:
                return self._once(*kept, method, target, content, headers, timeout_s)
            except (OSError, HTTPException):
                kept[0].close()  # the other side had let go of it: a fresh connection tells how things are
        fresh, address = self._connect(timeout_s)
        try:
            return self._once(fresh, address, method, target, content, headers, timeout_s)
        except (OSError, HTTPException) as error:
            fresh.close()
            self._turn_away(address)
            raise _unreachable(address, error) from error

    def _once(
        self,
        connection: HTTPConnection,
        address: Address,
        method: str,
        target: str,
        content: Content | None,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> Answer:
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        source = content() if callable(content) else content
        try:
            connection.request(method, address.prefix + target, body=source, headers=dict(headers))
            response = connection.getresponse()
            read = response.read()
        finally:
            if source is not None and not isinstance(source, bytes):
                source.close()
        if response.will_close:
            connection.close()
        else:
            with self._lock:
                self._idle.append((connection, address))
        if response.status >= 400:
            error = error_from(response.status, read, retry_after=response.headers.get("Retry-After", ""))
            if isinstance(error, Unavailable):
                self._turn_away(address)
            raise error
        return Answer(response.status, dict(response.headers), read)

    def _connect(self, timeout_s: float) -> tuple[HTTPConnection, Address]:
        """A fresh connection to the first address that takes one. Raises: Unavailable, of the last one, when none does.

        Nothing is sent before, so that going on to another address repeats nothing.
        """
        for tried in range(len(self._addresses)):
            address = self._address()
            is_last = tried + 1 == len(self._addresses)
            connection = self._connection(address, CONNECT_TIMEOUT_S if is_last else TURN_AWAY_S)
            try:
                connection.connect()  # sets TCP_NODELAY
            except OSError as error:
                connection.close()
                self._turn_away(address)
                if is_last:
                    raise _unreachable(address, error) from error
                continue
            connection.sock.settimeout(timeout_s)
            return connection, address
        raise AssertionError("unreachable: the last address raises")

    def _connection(self, address: Address, timeout_s: float) -> HTTPConnection:
        if address.secure:
            return HTTPSConnection(address.host, address.port, timeout=timeout_s, context=self._context)
        return HTTPConnection(address.host, address.port, timeout=timeout_s)

    def _address(self) -> Address:
        return self._addresses[self._asked % len(self._addresses)]

    def _turn_away(self, address: Address) -> None:
        """Have the next call ask another address, unless another thread has turned away from this one already."""
        with self._lock:
            if len(self._addresses) == 1 or self._address() is not address:
                return
            self._asked += 1
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()


def _trusting(ca: str) -> SSLContext:
    """Raises: InvalidRequest when there is no certificate in it."""
    from tidemill.runner.client import trusting

    try:
        return trusting(ca)
    except ValueError as error:
        raise InvalidRequest(f"It cannot be used: {error}.", field="TIDEMILL_API_CA", mend="Give PEM.") from None


def _target(path: str, query: Mapping[str, Any] | None) -> str:
    asked = {name: _query_text(value) for name, value in (query or {}).items() if value not in (None, "")}
    return path + (f"?{urlencode(asked)}" if asked else "")


def _unreachable(address: Address, error: Exception) -> Unavailable:
    what = "refuses connections" if isinstance(error, ConnectionRefusedError) else f"does not answer ({error!r})"
    if isinstance(error, TimeoutError):
        what = "does not answer in time"
    if isinstance(error, SSLCertVerificationError):
        return Unavailable(
            f"it is not certain that {address.url} is the control plane: {error.verify_message}",
            mend="Say what vouches for it: TIDEMILL_API_CA, a PEM file with the certificate of its authority.",
        )
    return Unavailable(
        f"the control plane at {address.url} {what}", mend="Is it running? See: tidemill status, tidemill up."
    )


class Attempts:
    """Tries in turn: iterate, and do the work inside ``with attempt``; failures worth another try are kept quiet.

    The pauses double from 50 ms to 2 s, each between half and one and a half of that.
    """

    def __init__(self, for_s: float, on_retry: OnRetry | None = None) -> None:
        self._deadline = time.monotonic() + for_s
        self._pause_s = 0.05
        self._on_retry = on_retry

    def __iter__(self) -> Iterator[Attempts]:
        while True:
            yield self

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Unavailable):
            return False
        asked = float(error.data.get("retry_after_s", 0.0))
        pause = max(asked, self._pause_s * (0.5 + int.from_bytes(os.urandom(2), "big") / 65_536))
        if time.monotonic() + pause > self._deadline:
            return False
        if self._on_retry is not None:
            self._on_retry(error)
        time.sleep(pause)
        self._pause_s = min(self._pause_s * 2, 2.0)
        return True


class Stream:
    """Octets as they come, on a connection of their own."""

    def __init__(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        self.headers = response.headers
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        """Pieces until the end. Raises: Unavailable when the connection breaks before it."""
        try:
            while piece := self._response.read1(65_536):
                yield piece
        except (OSError, HTTPException, ValueError, AttributeError) as error:
            raise Unavailable("the connection to the control plane broke") from error

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; harmless twice."""
        self._response.close()
        self._connection.close()


class Upload:
    """A body being sent in pieces."""

    def __init__(self, connection: HTTPConnection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, piece: bytes) -> None:
        """Raises: Unavailable when the connection broke."""
        if not piece:
            return
        with self._lock:
            try:
                self._connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            except OSError as error:
                raise Unavailable("the connection to the control plane broke") from error

    def finish(self) -> None:
        """End the body and hear the answer. Raises: as ``Transport.call``."""
        try:
            with self._lock:
                self._connection.send(b"0\r\n\r\n")
            response = self._connection.getresponse()
            if response.status >= 400:
                raise error_from(response.status, response.read(1 << 20))
        except (OSError, HTTPException) as error:
            raise Unavailable("the connection to the control plane broke") from error
        finally:
            self.close()

    def close(self) -> None:
        """Hang up; harmless twice."""
        self._connection.close()


def segment(text: str) -> str:
    """Text as one segment of a path, whatever is in it."""
    return quote(text, safe=":@") if text not in (".", "..") else quote(text).replace(".", "%2E")


def error_from(status: int, content: bytes, *, retry_after: str = "") -> TidemillError:
    """The exception that an answer of ``status`` stands for: by its problem's code, then its kind, then status."""
    try:
        problem = json.loads(content)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": content[:200].decode("utf-8", "replace").strip()}
    detail = problem.get("detail")
    if not isinstance(detail, str):
        detail = json.dumps(detail) if detail else f"the answer was {status}"
    data = {"status": status, "errors": problem.get("errors") or []}
    if retry_after.isdigit():
        data["retry_after_s"] = float(retry_after)
    made = _error_class(str(problem.get("code") or ""), str(problem.get("kind") or ""), status)
    return made(
        detail,
        field=str(problem.get("field") or ""),
        value=problem.get("value"),
        mend=str(problem.get("mend") or ""),
        **data,
    )


def _error_class(code: str, kind: str, status: int) -> type[TidemillError]:
    known = next((found for found in _tree(TidemillError) if found.code == code), None) if code else None
    if known is not None:
        return known
    if kind in ErrorKind._value2member_map_:
        return type("TidemillError", (TidemillError,), {"code": code or kind, "kind": ErrorKind(kind)})
    return _BY_STATUS.get(status, InvalidRequest if 400 <= status < 500 else TidemillError)


def _tree(root: type[TidemillError]) -> Iterator[type[TidemillError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == root.__module__:
            yield from _tree(child)


def _query_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
