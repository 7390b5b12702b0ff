"""HTTP/1.1 messages without I/O: heads checked and taken apart, bodies measured, ambiguity refused.

A head is first cut out by this module at the one empty line that ends it, so its size and its end never depend on
how the bytes happened to arrive; httptools then reads it in strict mode. What two parsers could read differently (a
bare CR or LF, a folded line, two lengths, a length beside chunks) is refused, because the peer behind may read it
the other way. Source: RFC 9112, sections 2.2, 5.2, 6 and 7.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

import httptools

HEAD_LIMIT: Final = 32 * 1024
_CHUNK_LINE_LIMIT: Final = 256
_TRAILER_LIMIT: Final = 8 * 1024
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
_SIZES: Final[Mapping[bytes, int]] = {b"%x" % size: size for size in range(1, 1 << 14)}
"""Sizes of chunks as nearly all are written."""
_SIZE_ENDS_WITHIN: Final = 6
_REMEMBERED: Final = 256
"""Response heads that are read once however often they come,"""
_REMEMBERED_HEAD: Final = 2048
"""and the bytes of the longest of these."""
_LENGTH_LINE: Final = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})\r\n", re.IGNORECASE)
_OWN: Final = b"x-tidemill-"
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_SINGLE: Final = (b"content-length", b"transfer-encoding", b"host", b"expect")
"""Headers that may be there once only."""

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case with their values, in the order received."""

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


class Malformed(Exception):
    """A message that is refused, with the HTTP status that says why."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        self.detail = detail
        super().__init__(detail)


@dataclass(slots=True, kw_only=True)
class _Head:
    headers: list[tuple[bytes, bytes]]
    _lines: dict[frozenset[bytes], bytes] = field(default_factory=dict, repr=False, compare=False)

    def lines(self, *, without: frozenset[bytes]) -> bytes:
        """The headers that are meant for the far end, but for those named and the body's length, as on the wire."""
        known = self._lines.get(without)
        if known is None:
            named = without | {b"content-length"}
            known = self._lines[without] = write_lines(end_to_end(self.headers, without=named))
        return known


@dataclass(slots=True, kw_only=True)
class RequestHead(_Head):
    """A request's head. ``length`` is the body's bytes, None when it comes in chunks."""

    method: bytes
    target: bytes
    http_1_0: bool
    host: bytes
    length: int | None
    keep_alive: bool
    expects_continue: bool
    request_id: bytes = b""
    """What answers, logs and books call the request, once somebody asked."""
    path: bytes = field(init=False)
    """The target without its query."""
    own: Headers = field(init=False)
    """The headers that are for the gateway itself."""
    given_id: bytes = field(init=False)
    """The client's own name for the request, empty when it gives none that is acceptable."""

    def __post_init__(self) -> None:
        self.path = self.target.partition(b"?")[0]
        self.own = [pair for pair in self.headers if pair[0].startswith(_OWN)]
        given = (value for name, value in self.headers if name == b"x-request-id" and _REQUEST_ID.fullmatch(value))
        self.given_id = next(given, b"")

    def header(self, name: bytes) -> bytes | None:
        """The value of the header of that lower-case name, None when absent.

        Raises: Malformed when it is there more than once.
        """
        return _only(self.headers, name)


class Repeated:
    """A head that was read, for requests that say the same but for the length of their bodies: most of a connection's.

    It is one object for all of them, which come one after another.
    """

    __slots__ = ("_after", "_before", "_from", "_place", "head")

    def __init__(self, said: bytes, head: RequestHead) -> None:
        """``said`` is the head as it came, not much longer than it may be."""
        self.head = head
        line = _LENGTH_LINE.search(said)
        self._before, self._after = (said[: line.start(1)], said[line.end(1) :]) if line else (said, b"")
        self._from = len(self._before)
        names = [name for name, _ in head.headers]
        self._place = names.index(b"content-length") if line else 0

    def end_in(self, data: bytes) -> int:
        """Where the head ends that ``data`` begins with, then ``head`` is as it says; zero when it is another."""
        if not data.startswith(self._before):
            return 0
        start, after = self._from, self._after
        head = self.head
        if after:
            end = data.find(b"\r", start, start + 16)
            length = data[start:end]
            if end < 0 or not length.isdigit() or not data.startswith(after, end):
                return 0
            head.length = int(length)
            head.headers[self._place] = (b"content-length", length)
            start = end + len(after)
        head.request_id = b""
        return start


@dataclass(slots=True, kw_only=True)
class ResponseHead(_Head):
    """A response's head. ``length`` None and not ``chunked`` means that the body ends with the connection."""

    status: int
    reason: bytes
    length: int | None
    chunked: bool
    keep_alive: bool
    is_event_stream: bool = field(init=False)
    """Whether the body is a stream of server-sent events."""

    def __post_init__(self) -> None:
        self.is_event_stream = False
        for name, value in self.headers:
            if name == b"content-type" and value[:17].lower() == b"text/event-stream":
                self.is_event_stream = True


def cut_head(data: bytes) -> tuple[bytes, bytes] | None:
    """The head at the start of ``data`` with its empty line, and what follows; None when more bytes are needed.

    Raises: Malformed as soon as the bytes cannot become a head; the same however they were split.
    """
    end = data.find(b"\r\n\r\n", 0, HEAD_LIMIT)
    head = data[:HEAD_LIMIT] if end < 0 else data[: end + 4]
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines:
        raise Malformed(400, "A header line ends with a bare line feed.")
    if end < 0:
        if len(data) >= HEAD_LIMIT:
            raise Malformed(431, f"The header is larger than {HEAD_LIMIT} bytes.")
        return None
    if head.count(b"\r") != lines:
        raise Malformed(400, "A header line holds a bare carriage return.")
    return head, data[end + 4 :]


def read_request(head: bytes) -> RequestHead:
    """The request that ``head``, as cut, describes. Raises: Malformed."""
    sink = _Sink()
    parser = httptools.HttpRequestParser(sink)
    _parse(parser, head, sink)
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise Malformed(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    old = version == "1.0"
    found = _by_name(sink.headers)
    length, chunked = _framing(found)
    if chunked and old:
        raise Malformed(400, "HTTP/1.0 has no Transfer-Encoding.")
    host = found.get(b"host")
    if host is None and not old:
        raise Malformed(400, "The Host header is missing.")
    expect = found.get(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        raise Malformed(417, "The only expectation understood is 100-continue.")
    return RequestHead(
        method=parser.get_method(),
        target=bytes(sink.target),
        http_1_0=old,
        headers=sink.headers,
        host=host or b"",
        length=None if chunked else length or 0,
        keep_alive=_keep_alive(sink.headers, old),
        expects_continue=expect is not None and not old,
    )


def take_response(data: bytes) -> tuple[ResponseHead, bytes] | None:
    """The head of the response at the start of ``data``, and what follows it; None when more bytes are needed.

    Nobody may change it: it is read once however often it comes, unless it is long or holds what is one client's own.
    Raises: Malformed.
    """
    end = data.find(b"\r\n\r\n", 0, _REMEMBERED_HEAD) + 4
    known = _known.get(data[:end]) if end > 3 else None
    if known is not None:
        return known, data[end:]
    cut = cut_head(data)
    if cut is None:
        return None
    head = read_response(cut[0])
    if len(cut[0]) <= _REMEMBERED_HEAD and not any(name == b"set-cookie" for name, _ in head.headers):
        if len(_known) >= _REMEMBERED:
            del _known[next(iter(_known))]
        _known[cut[0]] = head
    return head, cut[1]


def read_response(head: bytes) -> ResponseHead:
    """The response that ``head``, as cut, describes. Raises: Malformed."""
    sink = _Sink()
    parser = httptools.HttpResponseParser(sink)
    _parse(parser, head, sink)
    status = parser.get_status_code()
    length, chunked = _framing(_by_name(sink.headers))
    if 100 <= status < 200 or status in (204, 304):
        length, chunked = 0, False
    return ResponseHead(
        status=status,
        reason=bytes(sink.reason),
        headers=sink.headers,
        length=length,
        chunked=chunked,
        keep_alive=_keep_alive(sink.headers, parser.get_http_version() != "1.1"),
    )


_known: Final[dict[bytes, ResponseHead]] = {}
"""Response heads that may come again, the oldest first."""


def end_to_end(headers: Headers, *, without: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """The headers that are meant for the far end: none that concern one connection, none named in ``without``."""
    dropped = _HOP_BY_HOP | without
    for name, value in headers:
        if name == b"connection":
            dropped |= {token.strip().lower() for token in value.split(b",")}
    return [pair for pair in headers if pair[0] not in dropped]


def write_head(first_line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A head on the wire, with its empty line."""
    return b"%b\r\n%b\r\n" % (first_line, write_lines(headers))


def write_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers on the wire, each with its line end."""
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])


def chunk(payload: bytes) -> bytes:
    """A non-empty ``payload`` as one chunk on the wire."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def header_value(text: str) -> bytes:
    """A text as the value of a header: what is no printable ASCII is percent-encoded."""
    return quote(text, safe=" !#$&'()*+,/:;=?@[]~").encode()


LAST_CHUNK: Final = b"0\r\n\r\n"


class ChunkedBody:
    """Reads one chunked body; extensions and trailers are checked and dropped."""

    __slots__ = ("_buffer", "_remaining", "_trailers", "rest")

    def __init__(self) -> None:
        self._buffer = b""
        self._remaining = -2
        self._trailers = -1
        self.rest: bytes | None = None
        """What followed the body, once it is complete; None until then."""

    def feed(self, data: bytes) -> list[bytes]:
        """The payload found in ``data``, in pieces. Raises: Malformed; the same however the bytes were split."""
        pieces: list[bytes] = []
        data = self._buffer + data if self._buffer else data
        position, size = 0, len(data)
        while self.rest is None:
            if self._remaining > 0:  # inside a chunk
                if position == size:
                    break
                piece = data[position : position + self._remaining]
                pieces.append(piece)
                position += len(piece)
                self._remaining -= len(piece)
            elif self._remaining == 0:  # the line end after a chunk
                ending = data[position : position + 2]
                if ending != b"\r\n"[: len(ending)]:
                    raise Malformed(400, "A chunk does not end where its size says.")
                if len(ending) < 2:
                    break
                position += 2
                self._remaining = -2
            elif (
                self._remaining == -2
                and (end := data.find(b"\r\n", position, position + _SIZE_ENDS_WITHIN)) > 0
                and (known := _SIZES.get(data[position:end]))
            ):
                position = end + 2
                if data.startswith(b"\r\n", position + known):  # all of the chunk is here
                    pieces.append(data[position : position + known])
                    position += known + 2
                else:
                    self._remaining = known
            else:
                line = self._line(data, position)
                if line is None:
                    break
                position += len(line) + 2
                self._take_line(line)
                if self._remaining == -1 and not line:
                    self.rest = data[position:]
        self._buffer = b"" if self.rest is not None else data[position:]
        return pieces

    def _take_line(self, line: bytes) -> None:
        if self._trailers >= 0:
            self._trailers += len(line) + 2
            if self._trailers > _TRAILER_LIMIT:
                raise Malformed(431, f"The trailer is larger than {_TRAILER_LIMIT} bytes.")
            return
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise Malformed(400, "A chunk has no valid size.")
        size = int(match[1], 16)
        if size:
            self._remaining = size
        else:
            self._remaining, self._trailers = -1, 0

    def _line(self, data: bytes, position: int) -> bytes | None:
        limit = _TRAILER_LIMIT if self._trailers >= 0 else _CHUNK_LINE_LIMIT
        window = data[position : position + limit]
        end = window.find(b"\n")
        line = window if end < 0 else window[: end + 1]
        carriage = line.find(b"\r")
        if carriage != len(line) - 2 if end >= 0 else 0 <= carriage < len(line) - 1:
            raise Malformed(400, "A chunk's line does not end with CR LF.")
        if end >= 0:
            return line[:-2]
        if len(window) >= limit:
            raise Malformed(400, "A chunk's line is too long.")
        return None


class _Sink:
    """What httptools calls back."""

    __slots__ = ("headers", "is_complete", "reason", "target")

    def __init__(self) -> None:
        self.target = b""
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_complete = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes | None) -> None:
        self.headers.append((name.lower(), value.strip(b" \t") if value else b""))

    def on_headers_complete(self) -> None:
        self.is_complete = True


def _parse(parser: httptools.HttpRequestParser | httptools.HttpResponseParser, head: bytes, sink: _Sink) -> None:
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # the upgrade is not taken; the message is an ordinary one
    except httptools.HttpParserError as error:
        raise Malformed(400, f"The header cannot be read: {error}.") from None
    if not sink.is_complete:
        raise Malformed(400, "The header cannot be read.")


def _by_name(headers: Headers) -> dict[bytes, bytes]:
    """The last value of each header. Raises: Malformed when one is there twice that may be there only once."""
    found = dict(headers)
    if len(found) != len(headers):
        for name in _SINGLE:
            _only(headers, name)
    return found


def _framing(found: Mapping[bytes, bytes]) -> tuple[int | None, bool]:
    """The body's length, when given, and whether it comes in chunks."""
    length = found.get(b"content-length")
    coding = found.get(b"transfer-encoding")
    if coding is not None:
        if length is not None:
            raise Malformed(400, "Content-Length and Transfer-Encoding exclude each other.")
        if coding.lower() != b"chunked":
            raise Malformed(400, "The only Transfer-Encoding understood is chunked.")
        return None, True
    if length is None:
        return None, False
    if _LENGTH.fullmatch(length) is None:
        raise Malformed(400, "Content-Length is not a number.")
    return int(length), False


def _only(headers: Headers, name: bytes) -> bytes | None:
    found: bytes | None = None
    for key, value in headers:
        if key == name:
            if found is not None:
                raise Malformed(400, f"The header {name.decode()} is there twice.")
            found = value
    return found


def _keep_alive(headers: Headers, http_1_0: bool) -> bool:
    """Whether the connection goes on after the message; with HTTP/1.0 never, to have one rule for it."""
    return not http_1_0 and not any(
        name == b"connection" and b"close" in (token.strip() for token in value.lower().split(b","))
        for name, value in headers
    )
