"""Commands inside a running worker: frames both ways over two HTTP bodies.

A frame is one byte of type, four bytes of length (big-endian), and the payload.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable, Iterator

from tidemill.errors import TidemillError, Unavailable
from tidemill.sdk.transport import Stream, Transport, Upload, segment

STDOUT, STDERR, STDIN, CLOSE, RESIZE, EXIT, FAILED = b"o", b"e", b"i", b"c", b"w", b"x", b"r"
_HEAD = struct.Struct(">cI")
_INPUT_PIECE = 32_768
_QUIET_S = 24 * 3_600.0


class FrameParser:
    """Frames out of octets cut anywhere."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The frames that ``piece`` completes, as (type, payload)."""
        self._rest += piece
        while len(self._rest) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._rest)
            if len(self._rest) < _HEAD.size + length:
                return
            payload = bytes(self._rest[_HEAD.size : _HEAD.size + length])
            del self._rest[: _HEAD.size + length]
            yield kind, payload


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """The octets of one frame."""
    return _HEAD.pack(kind, len(payload)) + payload


class ExecSession:
    """One command inside a worker. Iterate for what it writes; ``exit_code`` is there afterwards."""

    def __init__(self, transport: Transport, exec_id: str) -> None:
        self.exit_code: int | None = None
        self._path = f"/v1/execs/{segment(exec_id)}"
        self._input: Upload = transport.upload(f"{self._path}/input")
        try:
            self._output: Stream = transport.open("GET", f"{self._path}/output", timeout_s=_QUIET_S)
        except BaseException:
            self._input.close()
            raise

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """(``STDOUT`` or ``STDERR``, octets) until the command ended.

        Raises: TidemillError when it could not be run; Unavailable when the connection broke first.
        """
        parser = FrameParser()
        for piece in self._output:
            for kind, payload in parser.feed(piece):
                if kind in (STDOUT, STDERR):
                    yield kind, payload
                elif kind == FAILED:
                    raise TidemillError(payload.decode("utf-8", "replace"))
                elif kind == EXIT:
                    self.exit_code = int(payload)
                    return
        raise Unavailable("the connection to the worker broke before the command ended")

    def write(self, octets: bytes) -> None:
        """Give ``octets`` to the command's standard input."""
        for start in range(0, len(octets), _INPUT_PIECE):
            self._input.send(frame(STDIN, octets[start : start + _INPUT_PIECE]))

    def feed(self, pieces: Iterable[bytes]) -> threading.Thread:
        """A started thread that writes all of ``pieces`` and then ends the standard input."""

        def send() -> None:
            try:
                for piece in pieces:
                    self.write(piece)
                self.end_input()
            except Unavailable:
                return  # the command ended first, or its output tells what happened

        thread = threading.Thread(target=send, name="exec-input", daemon=True)
        thread.start()
        return thread

    def end_input(self) -> None:
        """End the command's standard input."""
        self._input.send(frame(CLOSE))

    def resize(self, rows: int, cols: int) -> None:
        """Tell the command's terminal its new size."""
        self._input.send(frame(RESIZE, b"%d %d" % (rows, cols)))

    def close(self) -> None:
        """Hang up; harmless twice."""
        self._input.close()
        self._output.close()

    def __enter__(self) -> ExecSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
