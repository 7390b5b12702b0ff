"""A control plane as runners see it, in memory: takes reports and logs with the real rules, and keeps a record.

For contract and fault tests of engines and runners. It serves real HTTP on the loopback, can go away and come
back at another port, answer with errors, be slow, and do what is asked and lose the answer.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Fault = Callable[[str, str], str]
"""Says for a method and path what goes wrong: ``error`` (500), ``refuse`` (the connection is closed before
anything is done), ``lose`` (done, and the connection closed without an answer), or nothing."""


@dataclass(slots=True)
class LaunchRecord:
    """What arrived about one launch. ``arrivals`` lists what came in which order, in words."""

    log: bytearray = field(default_factory=bytearray)
    complete: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)
    beats: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[str] = field(default_factory=list)
    gaps: int = 0
    first_log_s: float = 0.0
    commands: list[dict[str, Any]] = field(default_factory=list)

    def kinds(self) -> list[str]:
        """The types of the distinct events, in the order in which they first arrived."""
        return list(dict.fromkeys(str(event["type"]) for event in self.events))

    def event(self, kind: str) -> dict[str, Any] | None:
        """The first event of that type."""
        return next((event for event in self.events if event["type"] == kind), None)


@dataclass(slots=True)
class ExecRecord:
    """The two directions of a command run inside a worker."""

    input: list[bytes] = field(default_factory=list)
    output: bytearray = field(default_factory=bytearray)
    input_closed: bool = False
    output_ended: bool = False


class RecordingControlPlane:
    """The peer of runners. ``endpoint_file`` is kept pointing at where it serves.

    ``host`` is the address that it serves at, for runners that are elsewhere; ``port`` zero: another at each start.
    """

    def __init__(self, endpoint_file: Path, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.endpoint_file = endpoint_file
        self._address = (host, port)
        self.changed = threading.Condition()
        self.launches: dict[str, LaunchRecord] = {}
        self.execs: dict[str, ExecRecord] = {}
        self.directives: dict[str, int] = {}
        """Grace in ns of launches that are to stop."""
        self.fenced: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.secrets: dict[str, str] = {}
        self.fault: Fault = lambda _method, _path: ""
        self.delay_s = 0.0
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """Where it serves, or served last."""
        return str(json.loads(self.endpoint_file.read_text())["api_url"])

    def start(self) -> None:
        """Serve, at a new port unless one was given."""
        server = _Server(self._address, _Handler)
        server.plane = self
        self._server = server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        staging = self.endpoint_file.with_suffix(".new")
        staging.write_text(json.dumps({"api_url": f"http://{self._address[0]}:{server.server_address[1]}"}))
        staging.replace(self.endpoint_file)

    def stop(self) -> None:
        """Go away without a word, as a killed process does."""
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()
            server.cut()
        with self.changed:
            self.changed.notify_all()

    @property
    def serving(self) -> bool:
        """Whether it is there."""
        return self._server is not None

    def record(self, launch_id: str) -> LaunchRecord:
        """What arrived about that launch so far."""
        with self.changed:
            return self.launches.setdefault(launch_id, LaunchRecord())

    def wait_for(self, ready: Callable[[], bool], *, timeout_s: float = 20.0) -> bool:
        """Whether it became true, looking each time something arrives."""
        with self.changed:
            return self.changed.wait_for(ready, timeout_s)

    def wait_for_event(self, launch_id: str, kind: str, *, timeout_s: float = 20.0) -> dict[str, Any]:
        """The event of that type, waited for. Raises: AssertionError when it does not come."""
        record = self.record(launch_id)
        found = self.wait_for(lambda: record.event(kind) is not None, timeout_s=timeout_s)
        event = record.event(kind)
        if not found or event is None:
            raise AssertionError(f"no {kind} of {launch_id} within {timeout_s} s; arrived: {record.arrivals[-20:]}")
        return event

    def command(self, launch_id: str, command: dict[str, Any]) -> ExecRecord:
        """Send a command to a launch's runner; its streams."""
        with self.changed:
            self.launches.setdefault(launch_id, LaunchRecord()).commands.append(command)
            found = self.execs.setdefault(str(command["exec_id"]), ExecRecord())
            self.changed.notify_all()
        return found

    def feed(self, exec_id: str, frames: bytes, *, close: bool = False) -> None:
        """Send frames to a command."""
        with self.changed:
            self.execs[exec_id].input.append(frames)
            self.execs[exec_id].input_closed = close
            self.changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    plane: RecordingControlPlane

    def __init__(self, *arguments: Any) -> None:
        self._sockets: set[socket.socket] = set()
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is not worth a word here."""

    def cut(self) -> None:
        for connection in tuple(self._sockets):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                self._sockets.discard(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        plane = self.server.plane
        fault = plane.fault(self.command, self.path)
        if fault == "refuse" or not plane.serving:
            self._hang_up()
            return
        parts = urlsplit(self.path).path.strip("/").split("/")
        launch_id, what = parts[2], parts[3]
        if what == "execs" and self.command == "POST":
            self._take_output(parts[4])
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if plane.delay_s:
            time.sleep(plane.delay_s)
        if fault == "error":
            self._answer(500, {"detail": "planted"})
            return
        if what == "execs":
            self._give_input(parts[4])
            return
        if what == "blobs":
            self._blob(parts[4])
            return
        status, answer = self._act(launch_id, what, body)
        if fault == "lose":
            self._hang_up()
            return
        self._answer(status, answer)

    def _act(self, launch_id: str, what: str, body: bytes) -> tuple[int, dict[str, Any]]:
        plane = self.server.plane
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            return 401, {"code": "unauthorized"}
        if launch_id in plane.fenced:
            return 409, {"code": "fenced"}
        record = plane.record(launch_id)
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        with plane.changed:
            try:
                if what == "logs":
                    return self._logs(record, int(query["offset"]), body, complete=query.get("complete") == "1")
                if what == "commands":
                    plane.changed.wait_for(lambda: bool(record.commands) or not plane.serving, float(query["wait"]))
                    commands, record.commands = record.commands, []
                    return 200, {"commands": commands}
                if what == "secrets":
                    return 200, dict(plane.secrets)
                value = json.loads(body)
                if what == "report":
                    for event in value["events"]:
                        record.arrivals.append(str(event["type"]))
                        if event not in record.events:
                            record.events.append(event)
                else:
                    record.beats.append(value)
            finally:
                plane.changed.notify_all()
        grace_ns = plane.directives.get(launch_id)
        return 200, {"directive": "run" if grace_ns is None else "stop", "grace_ns": grace_ns or 0}

    def _logs(self, record: LaunchRecord, offset: int, data: bytes, *, complete: bool) -> tuple[int, dict[str, Any]]:
        if offset > len(record.log):
            record.gaps += 1
            return 409, {"offset": len(record.log)}
        if data and not record.log:
            record.first_log_s = time.perf_counter()
        record.log += data[len(record.log) - offset :]
        if complete and not record.complete:
            record.complete = True
            record.arrivals.append("log complete")
        return 200, {"offset": len(record.log)}

    def _blob(self, digest: str) -> None:
        content = self.server.plane.blobs.get(digest)
        if content is None:
            self._answer(404, {"code": "not_found", "detail": "there is no such blob"})
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _give_input(self, exec_id: str) -> None:
        plane = self.server.plane
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        found = plane.execs[exec_id]
        while True:
            with plane.changed:
                plane.changed.wait_for(lambda: bool(found.input) or found.input_closed or found.output_ended)
                frames, found.input = b"".join(found.input), []
                over = found.input_closed or found.output_ended
            if frames:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(frames), frames))
            if over:
                self.wfile.write(b"0\r\n\r\n")
                return

    def _take_output(self, exec_id: str) -> None:
        plane = self.server.plane
        found = plane.execs[exec_id]
        while size := int(self.rfile.readline().strip() or b"0", 16):
            data = self.rfile.read(size)
            self.rfile.readline()
            with plane.changed:
                found.output += data
                plane.changed.notify_all()
        self.rfile.readline()
        with plane.changed:
            found.output_ended = True
            plane.changed.notify_all()
        self._answer(200, {})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
